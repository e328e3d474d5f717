"""Words that travel between ranks, of which each says for itself that it has come: no flag is needed, and no fence.

Owns the order of memory. What is aligned to 4 or 8 bytes is stored whole, so a reader that sees it has all of it.
Data in bulk travels inverted, 4 bytes as 4 (`veiled`): what is zero is a place where nothing has come, and the reader
leaves it so again. A few words travel beside the number of their call (`send`): 8 bytes, which any data may be, and
nothing is cleared. Needs GPUs that reach each other's memory (NVLink). Needs Triton: imported only where it is
installed.

All threads of a program must leave a loop together where barriers follow in it: what decides is reduced over a tensor
that all of them have a part of, never a scalar that each has read for itself (see `peer_waits_triton.py`). Words in
bulk are such a tensor; of a few words several threads read each, at different times, so what they saw is reduced again.
"""

import triton
import triton.language as tl

from actors.kernels.peer_end import ABORT, BLAMED
from actors.kernels.peer_waits_triton import give_up, is_over, now_ns

_ABORT = tl.constexpr(ABORT)
_BLAMED = tl.constexpr(BLAMED)
_EAGER_POLLS = tl.constexpr(8)


@triton.jit  # type: ignore[untyped-decorator]
def low_of(words, DTYPE: tl.constexpr):
    """fp32 of the elements in the low half of each word; of fp32 words, the words."""
    if tl.float32 == DTYPE:
        values = words.to(tl.float32, bitcast=True)
    else:  # no early return: what follows is compiled all the same
        values = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def high_of(words, DTYPE: tl.constexpr):
    """fp32 of the elements in the high half of each word; zeros of fp32 words."""
    if tl.float32 == DTYPE:
        values = words.to(tl.float32) * 0.0
    else:
        values = ((words >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def packed(low, high, DTYPE: tl.constexpr):
    """Words of fp32 pairs, each rounded."""
    if tl.float32 == DTYPE:
        words = low.to(tl.int32, bitcast=True)
    else:
        lower = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = lower | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return words


@triton.jit  # type: ignore[untyped-decorator]
def veiled(words):
    """Words as they travel in bulk, none of them zero. All bits set (two NaNs of bf16 or fp16, or one of fp32) arrives
    as NaNs without the lowest bit; any other word as it is.
    """
    sent = ~words
    return tl.where(sent == 0, 1, sent)


@triton.jit  # type: ignore[untyped-decorator]
def send(bases, peer, at_bytes, words, columns, inside, number):
    """Stores words, each beside the call's number, into the area of `peer` from byte `at_bytes` on."""
    address = tl.load(bases + peer) + at_bytes
    target = tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16)
    sent = (number.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    tl.store(target + columns, sent, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def receive(
    at, present, number, state, host, bases, rank, at_told, timeout_ns, WORLD: tl.constexpr,
    WORLD_BLOCK: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """int32 [WORLD_BLOCK, BLOCK]: words at `at`, once all have come with the call's number."""
    arrived = _await_words(
        at, present, present, number, state, host, bases, rank, at_told, timeout_ns, True, WORLD, WORLD_BLOCK, LANES,
        IS_TIMED,
    )  # fmt: skip
    return arrived.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def receive_veiled(
    at, present, watched, state, host, bases, rank, at_told, timeout_ns, WORLD: tl.constexpr,
    WORLD_BLOCK: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """int32 [WORLD_BLOCK, BLOCK]: words at `at`, once no place is empty. Each is to be read by one thread alone, or
    else one could empty it before another has seen it.
    """
    return ~_await_words(
        at, present, watched, 0, state, host, bases, rank, at_told, timeout_ns, False, WORLD, WORLD_BLOCK, LANES,
        IS_TIMED,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _are_late(arrived, number, NUMBERED: tl.constexpr):
    """int32 of the shape of words: 1 where one has not come."""
    late = (arrived >> 32).to(tl.int32) != number if NUMBERED else arrived == 0
    return late.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _is_missing(arrived, number, lanes, NUMBERED: tl.constexpr):
    """1 if a word has not come as any thread has seen it, the same for all threads."""
    missing = tl.max(_are_late(arrived, number, NUMBERED))
    if NUMBERED:
        missing = tl.max(lanes * 0 + missing)
    return missing


@triton.jit  # type: ignore[untyped-decorator]
def _await_words(
    at, present, watched, number, state, host, bases, rank, at_told, timeout_ns, NUMBERED: tl.constexpr,
    WORLD: tl.constexpr, WORLD_BLOCK: tl.constexpr, LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """What is at `at` once all has come, or a wait was given up.

    All are polled a few times, which takes least time; who waits for longer polls those that are `watched`, and leaves
    the memory's bandwidth to those that are at work.
    """
    filler = number.to(tl.int64) << 32 if NUMBERED else 1  # of words that are not awaited
    arrived = tl.load(at, mask=present, other=filler, volatile=True)
    lanes = tl.arange(0, LANES)
    missing = _is_missing(arrived, number, lanes, NUMBERED)
    if missing != 0:
        told = (tl.load(bases + rank) + at_told).to(tl.pointer_type(tl.int64))
        began_ns = now_ns(lanes, IS_TIMED)
        polls, over, unmatched = 0, 0, 1
        while (missing != 0) & (over == 0):
            takes_all = (polls < _EAGER_POLLS) | (unmatched == 0)
            arrived = tl.load(at, mask=present & (watched | takes_all), other=filler, volatile=True)
            unmatched = _is_missing(arrived, number, lanes, NUMBERED)
            missing = tl.where(takes_all, unmatched, 1)
            polls += 1
            over = is_over(lanes, began_ns, polls, state + _BLAMED, told, host + _ABORT, timeout_ns, IS_TIMED)
        if missing != 0:
            arrived = tl.load(at, mask=present, other=filler, volatile=True)
            late = tl.max(_are_late(arrived, number, NUMBERED), axis=1)
            first = tl.min(tl.where(late != 0, tl.arange(0, WORLD_BLOCK), WORLD), axis=0)
            if NUMBERED:
                first = tl.min(lanes * 0 + first)
            if first < WORLD:
                give_up(first, state, host, told, bases, at_told, WORLD)
    return arrived
