"""How programs wait for a word that a peer writes, when they give up, and who learns of it: for kernels over mapped
peer memory.

Owns who looks at what how often. Words of the host lie across PCIe, where reads of one word come back one after
another: if all threads that wait read it, the last gets its answer so late that its peers wait as long, and do so too,
for ever. So one thread of a program looks, and a program looks at the host's word seldom and in its turn; who it was
that gave up is in device memory, where the others of this rank see it soon. Knows nothing of what is awaited. Needs
Triton: imported only where it is installed.

What is returned here is the same for all threads of a program, since it is reduced over all of them: they leave a loop
together, and barriers may follow in it. `lanes` is tl.arange(0, threads of a program).
"""

import triton
import triton.language as tl

from actors.kernels.peer_end import ABORT, BLAMED, REPORTED

_ABORT = tl.constexpr(ABORT)
_BLAMED = tl.constexpr(BLAMED)
_REPORTED = tl.constexpr(REPORTED)

POLLS_PER_LOOK = tl.constexpr(64)  # at words in device memory
LOOKS_PER_HOST_LOOK = tl.constexpr(64)  # and at the clock: every few milliseconds


@triton.jit  # type: ignore[untyped-decorator]
def read_by_one(word, lanes):
    """The word, which is not negative, as it is in memory now."""
    return tl.max(tl.load(word + lanes * 0, mask=lanes == 0, other=0, volatile=True), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def now_ns(lanes, IS_TIMED: tl.constexpr):
    """int64, of the shape of lanes: the clock in the first, as one thread reads it; zeros in all others.

    Of no meaning where nothing is timed.
    """
    clock = lanes.to(tl.int64)
    if IS_TIMED:
        clock = tl.inline_asm_elementwise(
            "{ .reg .pred p; mov.u64 $0, 0; setp.eq.s64 p, $1, 0; @p mov.u64 $0, %globaltimer; }",
            "=&l,l", [clock], dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip
    return clock


@triton.jit  # type: ignore[untyped-decorator]
def is_over(lanes, began_ns, polls, blamed, told, abort, timeout_ns, IS_TIMED: tl.constexpr):
    """1 if a wait that has polled so often is to be given up, else 0: looks every POLLS_PER_LOOK polls, so that a wait
    that is short costs nothing else.

    Pointers to words that say so if they are not 0: `blamed` and `told` on the device, `abort` at the host.
    """
    over = polls * 0
    if IS_TIMED:
        if polls % POLLS_PER_LOOK == 0:
            first = lanes == 0
            said = tl.load(blamed + lanes * 0, mask=first, other=0, volatile=True)
            said = said | tl.load(told + lanes * 0, mask=first, other=0, volatile=True)
            program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
            if (polls // POLLS_PER_LOOK + program) % LOOKS_PER_HOST_LOOK == 0:
                said = said | tl.load(abort + lanes * 0, mask=first, other=0, volatile=True)
                said = said | (now_ns(lanes, IS_TIMED) - began_ns > timeout_ns).to(tl.int64)
            over = tl.max((said != 0).to(tl.int32), axis=0)
    else:
        over += 1  # interpreted, programs run one after another, so nobody can be waited for
    return over


@triton.jit  # type: ignore[untyped-decorator]
def give_up(source, state, host, told, bases, at_told, WORLD: tl.constexpr):
    """Ends all waits of this rank, and those of the others by their word: for `source`, or for whom it was told of."""
    heard = tl.load(told, volatile=True)
    blamed = tl.where(heard != 0, heard, heard * 0 + source + 1)
    if tl.atomic_cas(state + _BLAMED, blamed * 0, blamed) == 0:
        tl.store(host + _REPORTED, blamed)
        for peer in tl.static_range(WORLD):
            tl.store((tl.load(bases + peer) + at_told).to(tl.pointer_type(tl.int64)), blamed)


@triton.jit  # type: ignore[untyped-decorator]
def heed(rank, state, host, bases, at_told, lanes, WORLD: tl.constexpr):
    """See `peer_end.heed`. A peer's kernels that send garbage begin when the one that gave up has ended."""
    told = (tl.load(bases + rank) + at_told).to(tl.pointer_type(tl.int64))
    if read_by_one(told, lanes) != 0:
        give_up(rank, state, host, told, bases, at_told, WORLD)


@triton.jit  # type: ignore[untyped-decorator]
def await_flag(
    flag, sequence, source, state, host, told, bases, at_told, timeout_ns, lanes, WORLD: tl.constexpr,
    IS_TIMED: tl.constexpr,
):  # fmt: skip
    """Waits until the flag of rank `source` in this rank's area has come to `sequence`, or gives up.

    What the flag stands for may be read behind one more read of it, with acquire semantics, and a barrier.
    """
    value = read_by_one(flag, lanes)
    if value < sequence:
        began_ns = now_ns(lanes, IS_TIMED)
        polls, over = 0, 0
        while (value < sequence) & (over == 0):
            value = read_by_one(flag, lanes)
            polls += 1
            over = is_over(lanes, began_ns, polls, state + _BLAMED, told, host + _ABORT, timeout_ns, IS_TIMED)
    if value < sequence:
        give_up(source, state, host, told, bases, at_told, WORLD)


@triton.jit  # type: ignore[untyped-decorator]
def show(bases, at, sequence, WORLD: tl.constexpr, WORLD_BLOCK: tl.constexpr):
    """Sets the flag at byte `at` of all areas, behind all that the program stored before its last barrier."""
    ranks = tl.arange(0, WORLD_BLOCK)
    is_one = ranks < WORLD
    flags = (tl.load(bases + ranks, mask=is_one, other=0) + at).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(flags, sequence + ranks * 0, mask=is_one, sem="release", scope="sys")
