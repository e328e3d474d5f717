"""What the host writes of a step stays as it is until the device has read it."""

import pytest
import torch

from actors.attention import step_fields
from actors.attention.step_fields import BUFFERS, StepFields


class Mark:
    """An event that the device reaches when somebody waits for it."""

    is_reached = False
    is_waited_for = False

    def query(self) -> bool:
        return self.is_reached

    def synchronize(self) -> None:
        self.is_reached = self.is_waited_for = True


def test_fields_are_not_written_again_before_the_device_has_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that sample nothing, as most of a long prompt's, may be launched faster than they are computed."""
    marks: list[Mark] = []

    def mark(_: torch.device) -> Mark:
        marks.append(Mark())
        return marks[-1]

    monkeypatch.setattr(step_fields, "mark", mark)
    fields = StepFields.of_prompts(8, torch.device("cpu"))
    for step in range(3 * BUFFERS):
        fields.next()[:] = step
        assert [mark.is_reached for mark in marks] == [idx + BUFFERS <= step for idx in range(step)]
        fields.send()
        assert bool((fields.packed_FB == step).all())


def test_nobody_waits_for_what_has_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = [Mark() for _ in range(2 * BUFFERS)]
    for each in marks:
        each.is_reached = True
    turns = iter(marks)
    monkeypatch.setattr(step_fields, "mark", lambda _: next(turns))
    fields = StepFields.of_singles(8, torch.device("cpu"))
    for _ in marks:
        fields.next()
        fields.send()
    assert not any(each.is_waited_for for each in marks)
