"""The Triton form of what `peer_sums.py` does with columns: gathers, and the largest of each row.

Owns the order of memory. Chunks that are gathered are read from their owner after a flag, stored with release and read
with acquire semantics at system scope; what ranks say of a row travels as words with the call's number beside them
(`peer_words_triton.py`).
Needs Triton: imported only where it is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.early_triton import await_inputs, early
from actors.kernels.largest_triton import as_key, block_of, largest_of_row, value_of
from actors.kernels.peer_sums import CALLS, GATHER_WORDS, SAID_WORDS, PeerSums
from actors.kernels.peer_waits_triton import await_flag, heed, show
from actors.kernels.peer_words_triton import receive, send

_CALLS = tl.constexpr(CALLS)
_WARPS_GATHER = 8


@triton.jit(do_not_specialize=["rank", "timeout_ns"])  # type: ignore[untyped-decorator]
def _largest_kernel(
    x, values, columns, bases, state, host, timeout_ns, rank, x_stride, at_told, at_said,
    CAPACITY: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WORLD: tl.constexpr,
    WORLD_BLOCK: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """One program per row: sends every other rank two words, order and column of its largest number. Tokens are made of
    what it gives, so a step in which a peer gave up ends here for this rank, too.

    An area has room for WORDS words of CAPACITY rows from every rank, at `at_said`.
    """
    await_inputs(HOLDS_NEXT=True)
    row = tl.program_id(0).to(tl.int64)
    sequence = tl.load(state + _CALLS + row) + 1
    number = sequence.to(tl.int32)
    key = largest_of_row(x + row * x_stride, WIDTH, BLOCK)
    word = tl.arange(0, 2)
    words = tl.where(word == 0, key >> 32, key).to(tl.int32)
    half = (sequence & 1) * WORLD
    for step in tl.static_range(WORLD - 1):
        at = at_said + ((half + rank) * CAPACITY + row) * (WORDS * 8)
        send(bases, (rank + 1 + step) % WORLD, at, words, word, word >= 0, number)
    sources = tl.arange(0, WORLD_BLOCK)
    is_own = (sources == rank)[:, None]
    present = (sources < WORLD)[:, None] & (word >= 0)[None, :]
    own = tl.load(bases + rank) + at_said + (half * CAPACITY + row) * (WORDS * 8)
    at = own.to(tl.pointer_type(tl.int64)) + sources[:, None].to(tl.int64) * (CAPACITY * WORDS) + word[None, :]
    arrived = receive(
        at, present & (is_own == 0), number, state, host, bases, rank, at_told, timeout_ns, WORLD, WORLD_BLOCK,
        LANES, IS_TIMED,
    )  # fmt: skip
    if row == 0:
        heed(rank, state, host, bases, at_told, tl.arange(0, LANES), WORLD)
    arrived = tl.where(is_own, words[None, :], arrived)
    order = tl.sum(tl.where(word[None, :] == 0, arrived, 0), axis=1)
    column = 0x7FFFFFFF - tl.sum(tl.where(word[None, :] == 1, arrived, 0), axis=1)
    keys = as_key(order, column + sources * WIDTH)
    best = tl.max(tl.where(sources < WORLD, keys, -0x8000000000000000), axis=0)
    tl.store(values + row, value_of((best >> 32).to(tl.int32)))
    tl.store(columns + row, 0x7FFFFFFF - (best & 0x7FFFFFFF))
    tl.store(state + _CALLS + row, sequence)


@triton.jit(do_not_specialize=["rank", "timeout_ns", "num_words", "row_words"])  # type: ignore[untyped-decorator]
def _gather_kernel(
    x, out, bases, state, host, timeout_ns, rank, num_words, row_words, at_gathered, at_flags, at_told,
    HALF_BYTES: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, WORLD: tl.constexpr,
    WORLD_BLOCK: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """One program per chunk of this rank's words: shows it, and copies the same chunk of all ranks."""
    await_inputs(HOLDS_NEXT=True)
    program = tl.program_id(0)
    sequence = tl.load(state + _CALLS + program) + 1
    parity = sequence & 1
    lanes = tl.arange(0, LANES)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_words
    shown = at_gathered + parity * HALF_BYTES
    own = tl.multiple_of((tl.load(bases + rank) + shown).to(tl.pointer_type(tl.int32)), 16)
    tl.store(own + at, tl.load(x + at, mask=inside, other=0), mask=inside)
    tl.debug_barrier()
    flag_at = at_flags + (parity * WORLD * PROGRAMS + program) * 8
    show(bases, flag_at + rank * (PROGRAMS * 8), sequence, WORLD, WORLD_BLOCK)
    told = (tl.load(bases + rank) + at_told).to(tl.pointer_type(tl.int64))
    for source in tl.static_range(WORLD):
        flag = (tl.load(bases + rank) + flag_at + source * (PROGRAMS * 8)).to(tl.pointer_type(tl.int64))
        await_flag(flag, sequence, source, state, host, told, bases, at_told, timeout_ns, lanes, WORLD, IS_TIMED)
        tl.atomic_add(flag, sequence * 0, sem="acquire", scope="sys")
        tl.debug_barrier()
        theirs = tl.multiple_of((tl.load(bases + source) + shown).to(tl.pointer_type(tl.int32)), 16)
        words = tl.load(theirs + at, mask=inside, other=0, cache_modifier=".cv")
        into = at // row_words * (row_words * WORLD) + source * row_words + at % row_words
        tl.store(out + into, words, mask=inside)
    tl.store(state + _CALLS + program, sequence)


def gather(peers: PeerSums, x_BV: Tensor, out_BV: Tensor) -> None:
    """One call of `peer_sums.gather_columns`; both are contiguous."""
    layout = peers.layout
    x_words, out_words = x_BV.view(torch.int32), out_BV.view(torch.int32)
    num_words = x_words.numel()
    _gather_kernel[(triton.cdiv(num_words, GATHER_WORDS),)](
        x_words, out_words, peers.bases, peers.state, peers.host, peers.timeout_ns, peers.rank, num_words,
        x_words.shape[1], layout.gathered, layout.gather_flags, layout.blame, HALF_BYTES=layout.gather_bytes,
        PROGRAMS=layout.gather_programs, BLOCK=GATHER_WORDS, WORLD=layout.world,
        WORLD_BLOCK=triton.next_power_of_2(layout.world), LANES=32 * _WARPS_GATHER, IS_TIMED=x_BV.is_cuda,
        num_warps=_WARPS_GATHER, **early(),
    )  # fmt: skip


def largest_columns(peers: PeerSums, x_BV: Tensor) -> tuple[Tensor, Tensor]:
    """See `peer_sums.largest_columns`."""
    layout, (num_rows, width) = peers.layout, x_BV.shape
    values_B = torch.empty(num_rows, dtype=torch.float32, device=x_BV.device)
    columns_B = torch.empty(num_rows, dtype=torch.int64, device=x_BV.device)
    block, warps = block_of(width)
    _largest_kernel[(num_rows,)](
        x_BV, values_B, columns_B, peers.bases, peers.state, peers.host, peers.timeout_ns, peers.rank,
        x_BV.stride(0), layout.blame, layout.said, CAPACITY=layout.max_rows, WORDS=SAID_WORDS, WIDTH=width, BLOCK=block,
        WORLD=layout.world, WORLD_BLOCK=triton.next_power_of_2(layout.world), LANES=32 * warps, IS_TIMED=x_BV.is_cuda,
        num_warps=warps, **early(),
    )  # fmt: skip
    return values_B, columns_B
