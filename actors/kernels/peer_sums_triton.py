"""The Triton form of the sums of `peer_sums.py`: one program per row, by words that carry the call's number beside
their data (`peer_words_triton.py`).

Owns what is sent to whom, and what becomes of a row's sum. Never uses multicast. Needs Triton: imported only where it
is installed.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.peer_sums import CALLS, PeerSums
from actors.kernels.peer_words_triton import high_of, low_of, packed, receive, send

_CALLS = tl.constexpr(CALLS)
_WATCHED_WORDS = tl.constexpr(4)  # the last ones: as many as keep loads of vectors

_WARPS_WHOLE, _WARPS_SLICED, _WARPS_FLAGGED = 16, 8, 4


@triton.jit  # type: ignore[untyped-decorator]
def part_words(a, b, at, b_at, inside, TWO: tl.constexpr, DTYPE: tl.constexpr):
    """The words of a row that this rank brings: a, or a + b rounded."""
    words = tl.load(a + at, mask=inside, other=0)
    if TWO:
        more = tl.load(b + b_at, mask=inside, other=0)
        words = packed(low_of(words, DTYPE) + low_of(more, DTYPE), high_of(words, DTYPE) + high_of(more, DTYPE), DTYPE)
    return words


@triton.jit  # type: ignore[untyped-decorator]
def residual_words(h, weight, h_at, columns, inside, ADDS: tl.constexpr, NORMS: tl.constexpr):
    """The words of h and of the norm's weight that a row's sum meets: read before anybody is waited for."""
    words = tl.zeros(h_at.shape, tl.int32)
    weights = words
    if ADDS:
        words = tl.load(h + h_at, mask=inside, other=0)
    if NORMS:
        weights = tl.load(weight + columns, mask=inside, other=0)
    return words, weights


@triton.jit  # type: ignore[untyped-decorator]
def finish_row(
    low, high, words, weights, h, out, h_at, out_at, inside, eps, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
    ADDS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """What becomes of a row's sum, which is rounded already: stored, added to h, or added and normed."""
    if not ADDS:
        tl.store(out + out_at, packed(low, high, DTYPE), mask=inside)
    else:
        words = packed(low_of(words, DTYPE) + low, high_of(words, DTYPE) + high, DTYPE)
        tl.store(h + h_at, words, mask=inside)
        if NORMS:
            low = tl.where(inside, low_of(words, DTYPE), 0.0)
            high = tl.where(inside, high_of(words, DTYPE), 0.0)
            scale = tl.rsqrt(tl.sum(low * low + high * high) / WIDTH + eps)
            words = packed(low * scale, high * scale, DTYPE)
            words = packed(
                low_of(words, DTYPE) * low_of(weights, DTYPE), high_of(words, DTYPE) * high_of(weights, DTYPE), DTYPE
            )
            tl.store(out + out_at, words, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def total_words(words, present, DTYPE: tl.constexpr):
    """int32 [BLOCK]: the sums over ranks, rounded, as words."""
    low = tl.sum(tl.where(present, low_of(words, DTYPE), 0.0), axis=0)
    high = tl.sum(tl.where(present, high_of(words, DTYPE), 0.0), axis=0)
    return packed(low, high, DTYPE)


@triton.jit(do_not_specialize=["rank", "timeout_ns"])  # type: ignore[untyped-decorator]
def _sum_whole_kernel(
    a, b, h, out, weight, bases, state, host, timeout_ns, rank, eps, a_stride, b_stride, h_stride, out_stride,
    at_told, CAPACITY: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, WORLD: tl.constexpr,
    WORLD_BLOCK: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, TWO: tl.constexpr, ADDS: tl.constexpr,
    NORMS: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """One program per row: sends it whole to every other rank, and sums what comes."""
    row = tl.program_id(0).to(tl.int64)
    sequence = tl.load(state + _CALLS + row) + 1
    number = sequence.to(tl.int32)
    columns = tl.arange(0, BLOCK)
    inside = columns < WORDS
    words = part_words(a, b, row * a_stride + columns, row * b_stride + columns, inside, TWO, DTYPE)
    old, weights = residual_words(h, weight, row * h_stride + columns, columns, inside, ADDS, NORMS)
    half = (sequence & 1) * WORLD
    for step in tl.static_range(WORLD - 1):
        peer = (rank + 1 + step) % WORLD  # all begin with another one
        send(bases, peer, ((half + rank) * CAPACITY + row) * (WORDS * 8), words, columns, inside, number)
    sources = tl.arange(0, WORLD_BLOCK)
    present = (sources < WORLD)[:, None] & inside[None, :]
    is_own = (sources == rank)[:, None]
    watched = (columns >= WORDS - _WATCHED_WORDS)[None, :]
    own = (tl.load(bases + rank) + (half * CAPACITY + row) * (WORDS * 8)).to(tl.pointer_type(tl.int64))
    at = tl.multiple_of(own, 16) + sources[:, None].to(tl.int64) * (CAPACITY * WORDS) + columns[None, :]
    arrived = receive(
        at, present & (is_own == 0), watched, number, state, host, bases, rank, at_told, timeout_ns, WORLD, WORLD_BLOCK,
        LANES, IS_TIMED,
    )  # fmt: skip
    total = total_words(tl.where(is_own, words[None, :], arrived), present, DTYPE)
    finish_row(
        low_of(total, DTYPE), high_of(total, DTYPE), old, weights, h, out, row * h_stride + columns,
        row * out_stride + columns, inside, eps, WIDTH, DTYPE, ADDS, NORMS,
    )  # fmt: skip
    tl.store(state + _CALLS + row, sequence)


@triton.jit(do_not_specialize=["rank", "timeout_ns"])  # type: ignore[untyped-decorator]
def _sum_sliced_kernel(
    a, b, h, out, weight, bases, state, host, timeout_ns, rank, eps, a_stride, b_stride, h_stride, out_stride,
    at_told, at_slices, at_sums, CAPACITY: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    WORLD: tl.constexpr, WORLD_BLOCK: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, TWO: tl.constexpr,
    ADDS: tl.constexpr, NORMS: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """One program per row: sends each other rank its slice of the row, sums its own slice, sends that to every other.

    WORDS are of a slice.
    """
    row = tl.program_id(0).to(tl.int64)
    sequence = tl.load(state + _CALLS + row) + 1
    number = sequence.to(tl.int32)
    columns = tl.arange(0, BLOCK)
    inside = columns < WORDS
    half = (sequence & 1) * WORLD
    sent_at = ((half + rank) * CAPACITY + row) * (WORDS * 8)
    for step in tl.static_range(WORLD - 1):
        peer = (rank + 1 + step) % WORLD  # all begin with another one
        first = peer * WORDS
        words = part_words(a, b, row * a_stride + first + columns, row * b_stride + first + columns, inside, TWO, DTYPE)
        send(bases, peer, at_slices + sent_at, words, columns, inside, number)
    first = rank * WORDS
    words = part_words(a, b, row * a_stride + first + columns, row * b_stride + first + columns, inside, TWO, DTYPE)
    sources = tl.arange(0, WORLD_BLOCK)
    present = (sources < WORLD)[:, None] & inside[None, :]
    is_own = (sources == rank)[:, None]
    row_columns = sources[:, None] * WORDS + columns[None, :]
    old, weights = residual_words(h, weight, row * h_stride + row_columns, row_columns, present, ADDS, NORMS)
    watched = (columns >= WORDS - _WATCHED_WORDS)[None, :]
    places = sources[:, None].to(tl.int64) * (CAPACITY * WORDS) + columns[None, :]
    own = tl.load(bases + rank) + (half * CAPACITY + row) * (WORDS * 8)
    at = tl.multiple_of((own + at_slices).to(tl.pointer_type(tl.int64)), 16) + places
    arrived = receive(
        at, present & (is_own == 0), watched, number, state, host, bases, rank, at_told, timeout_ns, WORLD, WORLD_BLOCK,
        LANES, IS_TIMED,
    )  # fmt: skip
    total = total_words(tl.where(is_own, words[None, :], arrived), present, DTYPE)
    for step in tl.static_range(WORLD - 1):
        send(bases, (rank + 1 + step) % WORLD, at_sums + sent_at, total, columns, inside, number)
    at = tl.multiple_of((own + at_sums).to(tl.pointer_type(tl.int64)), 16) + places
    arrived = receive(
        at, present & (is_own == 0), watched, number, state, host, bases, rank, at_told, timeout_ns, WORLD, WORLD_BLOCK,
        LANES, IS_TIMED,
    )  # fmt: skip
    arrived = tl.where(is_own, total[None, :], arrived)
    finish_row(
        low_of(arrived, DTYPE), high_of(arrived, DTYPE), old, weights, h, out, row * h_stride + row_columns,
        row * out_stride + row_columns, present, eps, WIDTH, DTYPE, ADDS, NORMS,
    )  # fmt: skip
    tl.store(state + _CALLS + row, sequence)


# --- launching ------------------------------------------------------------------------------------------------------

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def sum_rows(peers: PeerSums, parts: Sequence[Tensor]) -> Tensor:
    """See `peer_sums.all_reduce_rows`."""
    out_TD = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    _launch_sum(peers, parts, None, out_TD, None, 0.0)
    return out_TD


def add_rows(peers: PeerSums, h_TD: Tensor, parts: Sequence[Tensor]) -> None:
    """See `peer_sums.add_all_reduced_rows`."""
    _launch_sum(peers, parts, h_TD, None, None, 0.0)


def add_rms_norm_rows(peers: PeerSums, h_TD: Tensor, parts: Sequence[Tensor], weight_D: Tensor, eps: float) -> Tensor:
    """See `peer_sums.add_all_reduced_rms_norm`."""
    out_TD = torch.empty_like(h_TD, memory_format=torch.contiguous_format)
    _launch_sum(peers, parts, h_TD, out_TD, weight_D, eps)
    return out_TD


def _launch_sum(
    peers: PeerSums, parts: Sequence[Tensor], h_TD: Tensor | None, out_TD: Tensor | None, weight_D: Tensor | None,
    eps: float,
) -> None:  # fmt: skip
    layout, num_rows = peers.layout, parts[0].shape[0]
    a = _as_words(parts[0])
    b, h, out = (a if x is None else _as_words(x) for x in (parts[1] if len(parts) > 1 else None, h_TD, out_TD))
    weight = a if weight_D is None else weight_D.view(torch.int32)
    is_whole = num_rows <= layout.whole_rows
    words = layout.row_words if is_whole else layout.row_words // layout.world
    is_flagged = not is_whole and 0 < layout.flagged_rows <= num_rows
    warps = _WARPS_WHOLE if is_whole else _WARPS_FLAGGED if is_flagged else _WARPS_SLICED
    pointers = (
        a, b, h, out, weight, peers.bases, peers.state, peers.host, peers.timeout_ns, peers.rank, eps, a.stride(0),
        b.stride(0), h.stride(0), out.stride(0), layout.blame,
    )  # fmt: skip
    options = {
        "CAPACITY": layout.whole_rows if is_whole else layout.sliced_rows,
        "WORDS": words,
        "BLOCK": triton.next_power_of_2(words),
        "WORLD": layout.world,
        "WORLD_BLOCK": triton.next_power_of_2(layout.world),
        "WIDTH": layout.hidden,
        "DTYPE": _DTYPES[layout.dtype],
        "TWO": len(parts) > 1,
        "ADDS": h_TD is not None,
        "NORMS": weight_D is not None,
        "LANES": 32 * warps,
        "IS_TIMED": a.is_cuda,
        "num_warps": warps,
    }
    if is_whole:
        _sum_whole_kernel[(num_rows,)](*pointers, **options)
    elif is_flagged:
        from actors.kernels.peer_sums_flagged_triton import sum_flagged_kernel  # which is made of this module's parts

        sum_flagged_kernel[(num_rows,)](
            *pointers, layout.plain_slices, layout.plain_sums, layout.row_flags, **options
        )  # fmt: skip
    else:
        _sum_sliced_kernel[(num_rows,)](*pointers, layout.slices, layout.sums, **options)


def _as_words(x_TD: Tensor) -> Tensor:
    """int32 [T, words]. Rows are contiguous and begin at whole words."""
    return x_TD.view(torch.int32)
