"""One rank's end of memory that ranks map into each other, and how its waits end: by arrival, by time, or because the
host says so.

Owns the words that say who was given up. Knows nothing of what lies in the memory, nor of how it is mapped
(`dispatch/peer_memory.py`). The device's side of a wait is `peer_waits_triton.py`.
"""

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FLAG_BYTES = 8
POLL_S = 20e-6

BLAMED = 2
"""The word of `Waits.state` that holds 1 + the rank that was given up. The words around it are the kernels'."""

ABORT, REPORTED = 0, 1
"""Words of `Waits.host`: set by the host to end all waits; BLAMED, for the host to read."""


class Layout(Protocol):
    """Of an area, the same on every rank. `blame`: the byte at which it is told whom a rank gave up, as in BLAMED."""

    @property
    def world(self) -> int: ...

    @property
    def blame(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def state_words(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """The device's waits for peers, as the host knows and ends them.

    `state`: int64 on the device, BLAMED among its words, 0 at first. `host`: int64 [2], zeros at first, in memory that
    host and device reach.
    """

    state: Tensor
    host: Tensor
    timeout_s: float

    @property
    def timeout_ns(self) -> int:
        return int(self.timeout_s * 1e9)

    @property
    def given_up(self) -> int | None:
        """The rank that a wait was given up for, if one was. What the device does now may not be seen yet."""
        reported = int(self.host[REPORTED])
        return reported - 1 if reported else None

    @property
    def is_aborted(self) -> bool:
        return bool(self.host[ABORT])

    def abort(self) -> None:
        """Ends all waits, those on the device within milliseconds. From any thread; for good."""
        self.host[ABORT] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerEnd(Waits):
    """`rank` is its index among those that share the memory, and in all that is ordered by rank.

    `buffers[rank]`: uint8 [layout.num_bytes], zeros at first; `bases`: their addresses, int64 [world], on the device.
    `state` has layout.state_words, all zeros at first.
    """

    layout: Layout
    rank: int
    buffers: tuple[Tensor, ...]
    bases: Tensor


def meet(end: PeerEnd, at: int, step_bytes: int, sequence: int) -> None:
    """The reference of flags, over memory of this process: sets this rank's in all areas to `sequence`, and waits until
    all of its own area have come to it. That of rank r is at byte `at` + r * `step_bytes`.

    Where one was given up, later calls do not wait, and the others learn of it.
    """
    _tell(end, at + end.rank * step_bytes, sequence)
    own, ends_s = end.buffers[end.rank], time.monotonic() + end.timeout_s
    for rank in range(end.layout.world):
        while int(_flag(own, at + rank * step_bytes)[0]) < sequence:
            told = int(_flag(own, end.layout.blame)[0])
            if end.state[BLAMED] or end.host[ABORT] or told or time.monotonic() > ends_s:
                _give_up(end, told or rank + 1)
                return
            time.sleep(POLL_S)


def heed(end: PeerEnd) -> None:
    """The reference of what ends a step: gives up for whom a peer gave up, though all that was awaited has come. What
    the peer has sent since then is garbage; that it gave up is told before.
    """
    if told := int(_flag(end.buffers[end.rank], end.layout.blame)[0]):
        _give_up(end, told)


def _flag(buffer: Tensor, at: int) -> Tensor:
    """int64 [1]."""
    return buffer[at : at + FLAG_BYTES].view(torch.int64)


def _tell(end: PeerEnd, at: int, number: int) -> None:
    for buffer in end.buffers:
        _flag(buffer, at)[0] = number


def _give_up(end: PeerEnd, blame: int) -> None:
    if not end.state[BLAMED]:
        end.state[BLAMED] = end.host[REPORTED] = blame
        _tell(end, end.layout.blame, blame)
