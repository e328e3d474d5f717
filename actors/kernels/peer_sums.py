"""Sums and gathers over ranks that write into each other's memory: the collectives of tensor-parallel attention.

Owns the layout of a rank's area, the order of calls, and that every wait ends: by arrival, by time, or because the host
says so. Nothing waits for the host and no shape depends on data, so all of it can be captured and replayed. Knows
nothing of how areas are mapped (`dispatch/peer_memory.py`). On a CPU, areas are those of threads of one process.

Every rank makes the same calls with the same shapes in the same order. Every program of the calls (of a row, or of a
chunk) counts its own, whatever they are, on the device where they run and not where they are captured: so the counts
are the same on all ranks. Odd and even ones use different halves of each field: a program at call n + 2 was answered in
call n + 1 by its peers in all other ranks, whose kernels of call n had ended before they sent that. So nobody reads
what it sent in call n any more, and places that are to be left empty are.

Sums are in fp32 in one order and rounded once, so that all ranks get the same bits. Once a wait was given up, later
ones end after a few polls, results are garbage, and so is what lies in the areas: what goes on needs new ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.kernels.draw import Draws, draw_tokens
from actors.kernels.largest import largest
from actors.kernels.norm import add_rms_norm
from actors.kernels.peer_end import BLAMED, PeerEnd, heed, meet
from actors.kernels.triton_here import HAS_TRITON

WORD_BYTES = 4  # of a tensor
SENT_BYTES = 8  # of a flag, and of a word that travels with the call's number
SAID_WORDS = 4
LINE_BYTES = 128
PARITIES = 2

CALLS = BLAMED + 1
"""The word of `PeerSums.state` from which on each program's number of calls lies: of a row, or of a chunk."""

GATHER_WORDS = 2048  # of one program


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class SumLayout:
    """Byte offsets of the fields of an area, the same on every rank.

    Up to `max_rows` rows of `hidden` elements of `dtype`, whole words, are summed at a time. Each is cut into slices,
    one per rank, the last ones shorter if it must be: those that a rank sums lie at 0, as [parity, source, row, word],
    and all ranks' sums in `sums`, likewise. Both are zeros between calls (`peer_words_triton.py`). What else ranks say
    of a row, up to SAID_WORDS words with the call's number beside each, lies in `said`, [parity, source, row]. Gathers
    of up to `gather_bytes` of each rank at a time are read from `gathered`, chunk by chunk as `gather_flags` say so.
    """

    world: int
    hidden: int
    dtype: torch.dtype
    max_rows: int
    gather_bytes: int

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize

    @property
    def slice_words(self) -> int:
        """Of all slices but the last ones."""
        return -(-self.row_bytes // (WORD_BYTES * self.world))

    @property
    def gather_programs(self) -> int:
        return -(-self.gather_bytes // (GATHER_WORDS * WORD_BYTES))

    @property
    def state_words(self) -> int:
        return CALLS + max(self.max_rows, self.gather_programs)

    @property
    def sums(self) -> int:
        return _aligned(PARITIES * self.world * self.max_rows * self.slice_words * WORD_BYTES)

    @property
    def said(self) -> int:
        return 2 * self.sums

    @property
    def gathered(self) -> int:
        return self.said + _aligned(PARITIES * self.world * self.max_rows * SAID_WORDS * SENT_BYTES)

    @property
    def gather_flags(self) -> int:
        return self.gathered + _aligned(PARITIES * self.gather_bytes)

    @property
    def blame(self) -> int:
        return self.gather_flags + _aligned(PARITIES * self.world * self.gather_programs * SENT_BYTES)

    @property
    def num_bytes(self) -> int:
        return self.blame + LINE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSums(PeerEnd):
    """One rank's end of it."""

    layout: SumLayout

    @property
    def max_rows(self) -> int:
        """Rows of one call."""
        return self.layout.max_rows


def all_reduce_rows(peers: PeerSums, parts: Sequence[Tensor]) -> Tensor:
    """[T, D]: the sum over all ranks of the sum of their `parts` (one or two [T, D], contiguous rows; the sum of two is
    rounded before it is sent). T is from 1 to `max_rows`. Raises ValueError.
    """
    _check_rows(peers, parts)
    if parts[0].is_cuda and HAS_TRITON:
        from actors.kernels import peer_sums_triton

        return peer_sums_triton.sum_rows(peers, parts)
    return _sum(peers, parts)


def add_all_reduced_rows(peers: PeerSums, h_TD: Tensor, parts: Sequence[Tensor]) -> None:
    """h += what `all_reduce_rows` returns, which is rounded before it is added."""
    _check_rows(peers, parts)
    if h_TD.is_cuda and HAS_TRITON:
        from actors.kernels import peer_sums_triton

        peer_sums_triton.add_rows(peers, h_TD, parts)
    else:
        h_TD.add_(_sum(peers, parts))


def add_all_reduced_rms_norm(
    peers: PeerSums, h_TD: Tensor, parts: Sequence[Tensor], weight_D: Tensor, eps: float
) -> Tensor:
    """`add_all_reduced_rows`, then rms_norm(h) * weight, [T, D], as `kernels/norm.py` has it."""
    _check_rows(peers, parts)
    if h_TD.is_cuda and HAS_TRITON:
        from actors.kernels import peer_sums_triton

        return peer_sums_triton.add_rms_norm_rows(peers, h_TD, parts, weight_D, eps)
    return add_rms_norm(h_TD, (_sum(peers, parts),), weight_D, eps)


def gather_columns(peers: PeerSums, x_BV: Tensor) -> Tensor:
    """[B, world * V], rank r's columns from r * V on. Rows that are too many for one call go in several.

    x_BV is contiguous, its rows are whole words and fit `gather_bytes`, and it has the same shape on all ranks.
    """
    row_bytes, layout = x_BV.shape[1] * x_BV.element_size(), peers.layout
    if not x_BV.is_contiguous() or row_bytes % WORD_BYTES or not 0 < row_bytes <= layout.gather_bytes:
        raise ValueError(f"rows of {row_bytes} bytes cannot be gathered through {layout.gather_bytes}")
    out_BV = x_BV.new_empty(x_BV.shape[0], layout.world * x_BV.shape[1])
    step = layout.gather_bytes // row_bytes
    for first in range(0, x_BV.shape[0], step):
        rows_BV, into_BV = x_BV[first : first + step], out_BV[first : first + step]
        if x_BV.is_cuda and HAS_TRITON:
            from actors.kernels import peer_columns_triton

            peer_columns_triton.gather(peers, rows_BV, into_BV)
        else:
            _gather(peers, rows_BV, into_BV)
    return out_BV


def largest_columns(peers: PeerSums, x_BV: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [B] and int64 [B]: the largest of what `gather_columns` would return and its column, as `largest` has it.

    Gives up, too, if a peer has told that it did. x_BV has contiguous rows, at most `max_rows`. Raises ValueError.
    """
    if not 0 < x_BV.shape[0] <= peers.max_rows:
        raise ValueError(f"{x_BV.shape[0]} rows do not fit an area of {peers.max_rows}")
    if x_BV.is_cuda and HAS_TRITON:
        from actors.kernels import peer_columns_triton

        return peer_columns_triton.largest_columns(peers, x_BV)
    values_B, columns_B = largest(x_BV)
    mine_B2 = torch.stack((values_B.view(torch.int32), columns_B.int()), dim=1)
    of_all_BW2 = gather_columns(peers, mine_B2).unflatten(1, (peers.layout.world, 2))
    heed(peers)
    return first_largest(of_all_BW2[..., 0].contiguous().view(torch.float32), of_all_BW2[..., 1], x_BV.shape[1])


def draw_columns(peers: PeerSums, x_BV: Tensor, draws: Draws) -> Tensor:
    """int64 [R]: what `draw_tokens` draws from what `gather_columns` would return. `x_BV` has contiguous rows, of which
    at most `max_rows` draw. Raises ValueError.
    """
    if not 0 < len(draws.row_R) <= peers.max_rows:
        raise ValueError(f"{len(draws.row_R)} rows do not fit an area of {peers.max_rows}")
    if x_BV.is_cuda and HAS_TRITON:
        from actors.kernels.draw_triton import launch_draw

        return launch_draw(x_BV, draws, peers.layout.world * x_BV.shape[1], peers)
    return draw_tokens(gather_columns(peers, x_BV.index_select(0, draws.row_R)), draws.of_rows())


def first_largest(values_BW: Tensor, columns_BW: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """What `largest` says of W parts of `width` columns each, from what it said of each of them."""
    values_B1, of_rank_B1 = values_BW.max(1, keepdim=True)
    return values_B1[:, 0], (columns_BW.gather(1, of_rank_B1) + of_rank_B1 * width)[:, 0]


def _check_rows(peers: PeerSums, parts: Sequence[Tensor]) -> None:
    layout = peers.layout
    shape, dtype = parts[0].shape, parts[0].dtype
    if not 0 < len(parts) <= 2 or any(part.shape != shape or part.dtype != dtype for part in parts):
        raise ValueError("one or two parts of the same shape are summed")
    if not 0 < shape[0] <= peers.max_rows or shape[1] != layout.hidden or dtype != layout.dtype:
        raise ValueError(f"{list(shape)} of {dtype} does not fit an area of {peers.max_rows} rows of {layout.hidden}")


# --- the references: what the kernels mean, over memory of this process ---------------------------------------------


def _sum(peers: PeerSums, parts: Sequence[Tensor]) -> Tensor:
    """Everything is sent whole, through the room of slices."""
    layout, x_TD = peers.layout, parts[0] if len(parts) == 1 else parts[0] + parts[1]
    sequence = int(peers.state[CALLS]) + 1
    half = sequence % PARITIES * layout.max_rows * layout.row_bytes
    terms = [
        buffer[half : half + len(x_TD) * layout.row_bytes].view(layout.dtype).view(-1, layout.hidden)
        for buffer in peers.buffers
    ]
    terms[peers.rank].copy_(x_TD)
    _meet(peers, sequence)
    total_TD = terms[0].float()
    for term_TD in terms[1:]:
        total_TD = total_TD + term_TD.float()
    peers.state[CALLS] = sequence
    return total_TD.to(layout.dtype)


def _gather(peers: PeerSums, x_BV: Tensor, out_BV: Tensor) -> None:
    layout, sequence = peers.layout, int(peers.state[CALLS]) + 1
    half, num_bytes = sequence % PARITIES * layout.gather_bytes, x_BV.numel() * x_BV.element_size()
    own = peers.buffers[peers.rank]
    own[layout.gathered + half :][:num_bytes].view(x_BV.dtype).view(x_BV.shape).copy_(x_BV)
    _meet(peers, sequence)
    for rank, buffer in enumerate(peers.buffers):
        columns = slice(rank * x_BV.shape[1], (rank + 1) * x_BV.shape[1])
        out_BV[:, columns] = buffer[layout.gathered + half :][:num_bytes].view(x_BV.dtype).view(x_BV.shape)
    peers.state[CALLS] = sequence


def _meet(peers: PeerSums, sequence: int) -> None:
    """All ranks are at this call, as the flags of gathers say, those of the first program."""
    layout = peers.layout
    step_bytes = layout.gather_programs * SENT_BYTES
    meet(peers, layout.gather_flags + sequence % PARITIES * layout.world * step_bytes, step_bytes, sequence)
