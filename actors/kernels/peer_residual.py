"""The residual stream of a large step, divided by rows among ranks that write into each other's memory.

Owns the layout of a rank's area, the order of calls, and that every wait ends: by arrival, by time, or because the host
says so. In the area lie the step's rows: what a layer computed of them on this rank, until all ranks' parts are summed;
then what the next layer reads. Each row of a call is summed, added to the residual, normed, and sent to all by one
rank alone, so that all ranks get the same bits. Knows nothing of how areas are mapped (`dispatch/peer_memory.py`).
On a CPU, areas are those of threads of one process.

Every rank makes the same calls with the same rows in the same order. Calls are numbered on the device. Once a wait was
given up, later ones end after a few polls, and results are garbage.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.kernels.norm import add_rms_norm
from actors.kernels.peer_end import BLAMED, FLAG_BYTES, PeerEnd, meet
from actors.kernels.triton_here import HAS_TRITON

LINE_BYTES = 128
MOST_PROGRAMS = 132

SEQUENCE, FINISHED = 0, 1
"""Words of `PeerResidual.state`: the last call's number; programs that are done with this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualLayout:
    """Byte offsets of the fields of an area, the same on every rank: `max_rows` rows of `hidden` elements of `dtype`
    at 0; then flags, int64 [world]: the last call that each rank's parts are there for (`ready`), or that it has sent
    all its rows of (`done`); and the rank that somebody gave up.
    """

    world: int
    hidden: int
    dtype: torch.dtype
    max_rows: int

    @property
    def ready(self) -> int:
        return -(-self.max_rows * self.hidden * self.dtype.itemsize // LINE_BYTES) * LINE_BYTES

    @property
    def done(self) -> int:
        return self.ready + -(-self.world * FLAG_BYTES // LINE_BYTES) * LINE_BYTES

    @property
    def blame(self) -> int:
        return 2 * self.done - self.ready

    @property
    def state_words(self) -> int:
        return BLAMED + 1

    @property
    def num_bytes(self) -> int:
        return self.blame + LINE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerResidual(PeerEnd):
    """One rank's end of it. `keeper` holds the mapping."""

    layout: ResidualLayout
    keeper: Any = None

    def rows(self, rank: int) -> Tensor:
        """[max_rows, D] of the area of `rank`."""
        return self.buffers[rank][: self._row_bytes].view(self.layout.dtype).view(-1, self.layout.hidden)

    @property
    def _row_bytes(self) -> int:
        return self.layout.max_rows * self.layout.hidden * self.layout.dtype.itemsize


def kept_of(peers: PeerResidual, rows: slice) -> slice:
    """Which of a call's rows this rank keeps the residual of: an equal share, or what is left."""
    share = -(-(rows.stop - rows.start) // peers.layout.world)
    start = min(rows.start + peers.rank * share, rows.stop)
    return slice(start, min(start + share, rows.stop))


def add_sums(
    peers: PeerResidual,
    h_OD: Tensor,
    rows: slice,
    weight_D: Tensor | None,
    eps: float,
    num_programs: int = MOST_PROGRAMS,
) -> None:
    """Rows of the area, which hold this rank's parts, become those that the next layer reads, the same on all ranks.

    That is rms_norm(h) * weight, or h where there is no weight, once the sum of all ranks' parts, in fp32 in their
    order and rounded once, has been added to h. `h_OD`: h of the rows that `kept_of` says, changed in place.
    `num_programs`: about as many multiprocessors are busy with it.
    """
    num_rows = rows.stop - rows.start
    if not 0 <= rows.start < rows.stop <= peers.layout.max_rows:
        raise ValueError(f"{rows} is not in an area of {peers.layout.max_rows} rows")
    kept = kept_of(peers, rows)
    num_kept = kept.stop - kept.start
    if h_OD.shape != (num_kept, peers.layout.hidden) or not h_OD.is_contiguous():
        raise ValueError(f"rank {peers.rank} keeps {num_kept} of {num_rows} rows, not {list(h_OD.shape)}")
    if h_OD.is_cuda and HAS_TRITON:
        from actors.kernels import peer_residual_triton

        peer_residual_triton.meet(peers)
        peer_residual_triton.add_sums(peers, h_OD, kept, weight_D, eps, num_programs)
    else:
        _add_sums(peers, h_OD, kept, weight_D, eps)


# --- the reference: what the kernels mean, over memory of this process ------------------------------------------------


def _add_sums(peers: PeerResidual, h_OD: Tensor, kept: slice, weight_D: Tensor | None, eps: float) -> None:
    layout, sequence = peers.layout, int(peers.state[SEQUENCE]) + 1
    meet(peers, layout.ready, FLAG_BYTES, sequence)
    total_OD = peers.rows(0)[kept].float()
    for rank in range(1, layout.world):
        total_OD = total_OD + peers.rows(rank)[kept].float()
    h_OD.add_(total_OD.to(layout.dtype))
    x_OD = h_OD if weight_D is None else add_rms_norm(h_OD, (), weight_D, eps)
    for rank in range(layout.world):
        peers.rows(rank)[kept] = x_OD
    meet(peers, layout.done, FLAG_BYTES, sequence)
    peers.state[SEQUENCE] = sequence
