"""Shared fixtures. Unit tests may not start Ray."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(
    1
)  # tests share few cores with the processes they start; spinning threads would stall all of them


@pytest.fixture(autouse=True)
def _no_ray_in_unit_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "unit" not in Path(request.node.path).parts:
        return
    import ray

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a unit test tried to start Ray")

    monkeypatch.setattr(ray, "init", refuse)
