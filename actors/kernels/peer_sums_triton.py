"""The Triton form of the sums of `peer_sums.py`: one program per row, by words that say for themselves that they have
come (`peer_words_triton.py`).

Owns what is sent to whom, what becomes of a row's sum, and that whoever has read a word leaves its place empty before
its kernel ends. Peers write there again once they have heard from this rank's next kernel (`peer_sums.py`), which does
nothing before `await_inputs`. Never uses multicast. Needs Triton: imported only where it is installed.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.early_triton import await_inputs, early, let_next_begin
from actors.kernels.peer_sums import CALLS, PeerSums
from actors.kernels.peer_words_triton import high_of, low_of, packed, receive_veiled, veiled

_CALLS = tl.constexpr(CALLS)
_WATCHED_WORDS = tl.constexpr(4)  # the last ones: as many as keep loads of vectors

_MOST_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _part_words(a, b, at, b_at, inside, TWO: tl.constexpr, DTYPE: tl.constexpr):
    """The words of a row that this rank brings: a, or a + b rounded."""
    words = tl.load(a + at, mask=inside, other=0)
    if TWO:
        more = tl.load(b + b_at, mask=inside, other=0)
        words = packed(low_of(words, DTYPE) + low_of(more, DTYPE), high_of(words, DTYPE) + high_of(more, DTYPE), DTYPE)
    return words


@triton.jit  # type: ignore[untyped-decorator]
def _residual_words(h, weight, h_at, columns, inside, ADDS: tl.constexpr, NORMS: tl.constexpr):
    """The words of h and of the norm's weight that a row's sum meets: read before anybody is waited for."""
    words = tl.zeros(h_at.shape, tl.int32)
    weights = words
    if ADDS:
        words = tl.load(h + h_at, mask=inside, other=0)
    if NORMS:
        weights = tl.load(weight + columns, mask=inside, other=0)
    return words, weights


@triton.jit  # type: ignore[untyped-decorator]
def _finish_row(
    sums, words, weights, h, out, h_at, out_at, inside, eps, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
    ADDS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """What becomes of a row's sum, which is rounded already: stored, added to h, or added and normed."""
    if not ADDS:
        tl.store(out + out_at, sums, mask=inside)
    else:
        words = packed(
            low_of(words, DTYPE) + low_of(sums, DTYPE), high_of(words, DTYPE) + high_of(sums, DTYPE), DTYPE
        )  # fmt: skip
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
def _total_words(words, present, DTYPE: tl.constexpr):
    """int32 [BLOCK]: the sums over ranks, rounded, as words."""
    low = tl.sum(tl.where(present, low_of(words, DTYPE), 0.0), axis=0)
    high = tl.sum(tl.where(present, high_of(words, DTYPE), 0.0), axis=0)
    return packed(low, high, DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _inside(columns, row_columns, WORDS: tl.constexpr, WORLD: tl.constexpr, ROW_WORDS: tl.constexpr):
    """Whether a slice has these columns, which are `row_columns` of the row."""
    inside = columns < WORDS
    if WORDS * WORLD != ROW_WORDS:
        inside = inside & (row_columns < ROW_WORDS)
    return inside


@triton.jit  # type: ignore[untyped-decorator]
def _places(areas, at_bytes, columns, ALIGN: tl.constexpr):
    """int32 pointers [WORLD_BLOCK, BLOCK]: the words from byte `at_bytes` of the areas on."""
    first = tl.multiple_of((areas + at_bytes).to(tl.pointer_type(tl.int32))[:, None], [ALIGN, ALIGN])
    return first + columns


@triton.jit(do_not_specialize=["rank", "timeout_ns"])  # type: ignore[untyped-decorator]
def sum_kernel(
    a, b, h, out, weight, bases, state, host, timeout_ns, rank, eps, a_stride, b_stride, h_stride, out_stride, at_sums,
    at_told, CAPACITY: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    WORLD: tl.constexpr, WORLD_BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROW_WORDS: tl.constexpr, DTYPE: tl.constexpr,
    TWO: tl.constexpr, ADDS: tl.constexpr, NORMS: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """One program per row: sends each other rank its slice of the row, sums its own slice, sends that to every other.

    WORDS are of a slice, ALIGN bytes what all slices are aligned to. All that is sent at once is loaded before.
    """
    await_inputs(HOLDS_NEXT=True)
    row = tl.program_id(0).to(tl.int64)
    sequence = tl.load(state + _CALLS + row) + 1
    columns, sources = tl.arange(0, BLOCK)[None, :], tl.arange(0, WORLD_BLOCK)
    is_other = sources < WORLD - 1
    peers = (rank + 1 + sources) % WORLD  # all begin with another one
    areas, own_area = tl.load(bases + peers, mask=is_other, other=0), tl.load(bases + rank)
    at_row = peers[:, None] * WORDS + columns
    sent = is_other[:, None] & _inside(columns, at_row, WORDS, WORLD, ROW_WORDS)
    words = _part_words(a, b, row * a_stride + at_row, row * b_stride + at_row, sent, TWO, DTYPE)
    at_row = rank * WORDS + columns
    own = _inside(columns, at_row, WORDS, WORLD, ROW_WORDS)
    own_words = _part_words(a, b, row * a_stride + at_row, row * b_stride + at_row, own, TWO, DTYPE)
    half = (sequence & 1) * WORLD
    place = ((half + rank) * CAPACITY + row) * (WORDS * 4)  # of what this rank sends
    tl.store(_places(areas, place, columns, ALIGN), veiled(words), mask=sent)

    at_row = sources[:, None] * WORDS + columns
    is_rank, is_own = (sources < WORLD)[:, None], (sources == rank)[:, None]
    present = is_rank & _inside(columns, at_row, WORDS, WORLD, ROW_WORDS)
    old, weights = _residual_words(h, weight, row * h_stride + at_row, at_row, present, ADDS, NORMS)
    watched = columns >= WORDS - _WATCHED_WORDS
    received = own_area + (half * CAPACITY + row) * (WORDS * 4) + sources.to(tl.int64) * (CAPACITY * WORDS * 4)
    at, awaited = _places(received, 0, columns, ALIGN), is_rank & own & (is_own == 0)
    arrived = receive_veiled(
        at, awaited, watched, state, host, bases, rank, at_told, timeout_ns, WORLD, WORLD_BLOCK, LANES, IS_TIMED
    )  # fmt: skip
    total = _total_words(tl.where(is_own, own_words, arrived), is_rank & own, DTYPE)[None, :]
    to_all = tl.broadcast_to(veiled(total), (WORLD_BLOCK, BLOCK))
    tl.store(_places(areas, at_sums + place, columns, ALIGN), to_all, mask=is_other[:, None] & own)
    tl.store(at, tl.zeros_like(arrived), mask=awaited)
    at, awaited = _places(received, at_sums, columns, ALIGN), present & (is_own == 0)
    arrived = receive_veiled(
        at, awaited, watched, state, host, bases, rank, at_told, timeout_ns, WORLD, WORLD_BLOCK, LANES, IS_TIMED
    )  # fmt: skip
    let_next_begin()
    sums = tl.where(is_own, ~to_all, arrived)  # its own as the others have it
    _finish_row(
        sums, old, weights, h, out, row * h_stride + at_row, row * out_stride + at_row, present, eps, WIDTH,
        DTYPE, ADDS, NORMS,
    )  # fmt: skip
    tl.store(at, tl.zeros_like(arrived), mask=awaited)
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
    words, world_block = layout.slice_words, triton.next_power_of_2(layout.world)
    block = max(32, triton.next_power_of_2(words))
    warps = max(1, min(_MOST_WARPS, block * world_block // 128))  # so that no place is read by two threads
    sum_kernel[(num_rows,)](
        a, b, h, out, weight, peers.bases, peers.state, peers.host, peers.timeout_ns, peers.rank, eps, a.stride(0),
        b.stride(0), h.stride(0), out.stride(0), layout.sums, layout.blame, CAPACITY=layout.max_rows, WORDS=words,
        BLOCK=block, ALIGN=math.gcd(16, 4 * words), WORLD=layout.world, WORLD_BLOCK=world_block, WIDTH=layout.hidden,
        ROW_WORDS=a.shape[1], DTYPE=_DTYPES[layout.dtype], TWO=len(parts) > 1, ADDS=h_TD is not None,
        NORMS=weight_D is not None, LANES=32 * warps, IS_TIMED=a.is_cuda, num_warps=warps, **early(),
    )  # fmt: skip


def _as_words(x_TD: Tensor) -> Tensor:
    """int32 [T, words]. Rows are contiguous and begin at whole words."""
    return x_TD.view(torch.int32)
