"""The Triton form of sums of many rows: what is sent is data alone, and a flag for each row says that it is there.

Beside `peer_sums_triton.py`, whose words each carry the call's number and so double what travels: with few rows that
costs less than the fences here, with many it costs more. Owns the order of memory: flags are stored with release and
read with acquire semantics at system scope. Needs Triton: imported only where it is installed.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, attr-defined, misc"

import triton
import triton.language as tl

from actors.kernels.peer_sums import CALLS
from actors.kernels.peer_sums_triton import finish_row, part_words, residual_words, total_words
from actors.kernels.peer_waits_triton import await_flag, show
from actors.kernels.peer_words_triton import high_of, low_of

_CALLS = tl.constexpr(CALLS)


@triton.jit
def _await_all(
    flags, flag_step, sequence, state, host, bases, rank, at_told, timeout_ns, WORLD: tl.constexpr,
    WORLD_BLOCK: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """Until every rank's flag, `flag_step` words behind the one before, says `sequence`."""
    lanes = tl.arange(0, LANES)
    told = (tl.load(bases + rank) + at_told).to(tl.pointer_type(tl.int64))
    for source in tl.static_range(WORLD):
        flag = flags + source * flag_step
        await_flag(flag, sequence, source, state, host, told, bases, at_told, timeout_ns, lanes, WORLD, IS_TIMED)
    sources = tl.arange(0, WORLD_BLOCK)
    tl.atomic_add(
        flags + sources * flag_step, sequence * 0 + sources * 0, mask=sources < WORLD, sem="acquire", scope="sys"
    )
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rank", "timeout_ns"])
def sum_flagged_kernel(
    a, b, h, out, weight, bases, state, host, timeout_ns, rank, eps, a_stride, b_stride, h_stride, out_stride,
    at_told, at_slices, at_sums, at_flags, CAPACITY: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    WORLD: tl.constexpr, WORLD_BLOCK: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, TWO: tl.constexpr,
    ADDS: tl.constexpr, NORMS: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """One program per row: sends each rank its slice of the row, sums its own slice, sends that to every rank.

    WORDS are of a slice. Slices and sums lie as [parity, source, row, word], flags as [kind, parity, source, row].
    """
    row = tl.program_id(0).to(tl.int64)
    sequence = tl.load(state + _CALLS + row) + 1
    columns = tl.arange(0, BLOCK)
    inside = columns < WORDS
    half = (sequence & 1) * WORLD
    place = (half + rank) * CAPACITY + row  # of what this rank sends
    for step in tl.static_range(WORLD):
        peer = (rank + 1 + step) % WORLD  # all begin with another one
        first = peer * WORDS
        words = part_words(a, b, row * a_stride + first + columns, row * b_stride + first + columns, inside, TWO, DTYPE)
        target = (tl.load(bases + peer) + at_slices + place * (WORDS * 4)).to(tl.pointer_type(tl.int32))
        tl.store(tl.multiple_of(target, 16) + columns, words, mask=inside)
    tl.debug_barrier()
    show(bases, at_flags + place * 8, sequence, WORLD, WORLD_BLOCK)

    sources = tl.arange(0, WORLD_BLOCK)
    present = (sources < WORLD)[:, None] & inside[None, :]
    row_columns = sources[:, None] * WORDS + columns[None, :]
    old, weights = residual_words(h, weight, row * h_stride + row_columns, row_columns, present, ADDS, NORMS)
    own, received = tl.load(bases + rank), half * CAPACITY + row  # of what the first rank sends here
    places = sources[:, None].to(tl.int64) * (CAPACITY * WORDS) + columns[None, :]
    flags = (own + at_flags + received * 8).to(tl.pointer_type(tl.int64))
    _await_all(
        flags, CAPACITY, sequence, state, host, bases, rank, at_told, timeout_ns, WORLD, WORLD_BLOCK, LANES, IS_TIMED
    )  # fmt: skip
    at = tl.multiple_of((own + at_slices + received * (WORDS * 4)).to(tl.pointer_type(tl.int32)), 16) + places
    total = total_words(tl.load(at, mask=present, other=0, cache_modifier=".cg"), present, DTYPE)
    for step in tl.static_range(WORLD):
        target = tl.load(bases + (rank + 1 + step) % WORLD) + at_sums + place * (WORDS * 4)
        tl.store(tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16) + columns, total, mask=inside)
    second = 2 * WORLD * CAPACITY  # the flags of sums
    tl.debug_barrier()
    show(bases, at_flags + (second + place) * 8, sequence, WORLD, WORLD_BLOCK)
    _await_all(
        flags + second, CAPACITY, sequence, state, host, bases, rank, at_told, timeout_ns, WORLD, WORLD_BLOCK, LANES,
        IS_TIMED,
    )  # fmt: skip
    at = tl.multiple_of((own + at_sums + received * (WORDS * 4)).to(tl.pointer_type(tl.int32)), 16) + places
    arrived = tl.load(at, mask=present, other=0, cache_modifier=".cg")
    finish_row(
        low_of(arrived, DTYPE), high_of(arrived, DTYPE), old, weights, h, out, row * h_stride + row_columns,
        row * out_stride + row_columns, present, eps, WIDTH, DTYPE, ADDS, NORMS,
    )  # fmt: skip
    tl.store(state + _CALLS + row, sequence)
