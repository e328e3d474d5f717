"""How waits over shared memory end, by their reference."""

from dataclasses import dataclass

import torch

from actors.kernels.peer_end import BLAMED, FLAG_BYTES, PeerEnd, heed, meet


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Flags from byte 0 on, then whom somebody gave up."""

    world: int
    state_words: int = BLAMED + 1

    @property
    def blame(self) -> int:
        return self.world * FLAG_BYTES

    @property
    def num_bytes(self) -> int:
        return self.blame + FLAG_BYTES


def make_ends(timeout_s: float) -> list[PeerEnd]:
    layout = Layout(world=3)
    buffers = tuple(torch.zeros(layout.num_bytes, dtype=torch.uint8) for _ in range(layout.world))
    bases = torch.tensor([buffer.data_ptr() for buffer in buffers])
    zeros = lambda num: torch.zeros(num, dtype=torch.int64)  # noqa: E731
    return [
        PeerEnd(
            layout=layout, rank=rank, buffers=buffers, bases=bases, state=zeros(layout.state_words), host=zeros(2),
            timeout_s=timeout_s,
        )
        for rank in range(layout.world)
    ]  # fmt: skip


def flags(end: PeerEnd) -> list[int]:
    return end.buffers[end.rank][: end.layout.blame].view(torch.int64).tolist()


def test_a_peer_that_is_late_is_given_up_for_good_and_the_others_are_told() -> None:
    ends = make_ends(timeout_s=0.0)
    meet(ends[0], 0, FLAG_BYTES, 1)
    assert [end.given_up for end in ends] == [1, None, None]
    meet(ends[2], 0, FLAG_BYTES, 1)
    assert [end.given_up for end in ends] == [1, None, 1]
    meet(ends[1], 0, FLAG_BYTES, 1)
    assert ends[1].given_up is None, "all that it waits for is there"
    heed(ends[1])
    assert ends[1].given_up == 1, "what has come may be garbage"
    meet(ends[0], 0, FLAG_BYTES, 2)
    assert [end.given_up for end in ends] == [1, 1, 1]
    assert [flags(end) for end in ends] == [[2, 1, 1]] * 3


def test_an_abort_ends_a_wait_before_its_time() -> None:
    end = make_ends(timeout_s=1e9)[0]
    end.abort()
    meet(end, 0, FLAG_BYTES, 1)
    assert end.given_up == 1


def test_nobody_is_given_up_of_whom_nothing_was_told() -> None:
    ends = make_ends(timeout_s=0.0)
    heed(ends[0])
    assert [end.given_up for end in ends] == [None, None, None]
