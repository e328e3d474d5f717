"""The Triton form of `peer_residual.py`: rows are read from where they are, and sent to where they are read.

Owns the order of memory: flags are stored with release and read with acquire semantics at system scope. One program
waits for the peers' parts, in a launch of its own, so that whoever waits leaves the GPU to others; few programs then
take one row after another, as many as keep NVLink busy. Never uses multicast. Needs Triton: imported only where it is
installed.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, attr-defined"

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.early_triton import await_inputs, early
from actors.kernels.peer_residual import FINISHED, SEQUENCE, PeerResidual
from actors.kernels.peer_waits_triton import await_flag, show

_SEQUENCE = tl.constexpr(SEQUENCE)
_FINISHED = tl.constexpr(FINISHED)

_WARPS, _WARPS_MEETING = 8, 1
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _await_all(
    bases, at, rank, sequence, state, host, at_told, timeout_ns, WORLD: tl.constexpr, LANES: tl.constexpr,
    IS_TIMED: tl.constexpr,
):  # fmt: skip
    """Waits until every rank's flag of a field in this rank's area says `sequence`."""
    lanes = tl.arange(0, LANES)
    own = tl.load(bases + rank)
    told = (own + at_told).to(tl.pointer_type(tl.int64))
    for source in tl.static_range(WORLD):
        flag = (own + at + source * 8).to(tl.pointer_type(tl.int64))
        await_flag(flag, sequence, source, state, host, told, bases, at_told, timeout_ns, lanes, WORLD, IS_TIMED)
        tl.atomic_add(flag, sequence * 0, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rank", "timeout_ns"])
def _meet_kernel(
    bases, state, host, timeout_ns, rank, at_ready, at_told, WORLD: tl.constexpr, WORLD_BLOCK: tl.constexpr,
    LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """Says that this rank's parts are there, and waits until those of all ranks are."""
    await_inputs(HOLDS_NEXT=True)
    sequence = tl.load(state + _SEQUENCE) + 1
    show(bases, at_ready.to(tl.int64) + rank * 8, sequence, WORLD, WORLD_BLOCK)
    _await_all(bases, at_ready, rank, sequence, state, host, at_told, timeout_ns, WORLD, LANES, IS_TIMED)


@triton.jit
def _load_row(bases_W1, h, at, kept_at, inside, here, WORLD: tl.constexpr, WORLD_BLOCK: tl.constexpr):
    """What all ranks have computed of a row [WORLD_BLOCK, BLOCK], and its residual; zeros where it is not `here`."""
    present = (tl.arange(0, WORLD_BLOCK) < WORLD)[:, None] & (inside & here)[None, :]
    parts = tl.load(bases_W1 + at[None, :], mask=present, other=0.0, cache_modifier=".cg")
    return parts, tl.load(h + kept_at, mask=inside & here, other=0.0)


@triton.jit(do_not_specialize=["rank", "timeout_ns", "first", "num_kept"])
def _sum_kernel(
    h, weight, bases, state, host, timeout_ns, rank, first, num_kept, eps, at_done, at_told, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, WORLD: tl.constexpr, WORLD_BLOCK: tl.constexpr, DTYPE: tl.constexpr, NORMS: tl.constexpr,
    LANES: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    """`num_kept` rows of all areas from `first` on, each read while the one before it is computed. The last program to
    end tells the peers, and waits for them.
    """
    await_inputs(HOLDS_NEXT=True)
    columns, num_programs = tl.arange(0, BLOCK), tl.num_programs(0)
    inside = columns < WIDTH
    ranks = tl.arange(0, WORLD_BLOCK)
    present = (ranks < WORLD)[:, None] & inside[None, :]
    bases_W = tl.load(bases + ranks, mask=ranks < WORLD, other=0).to(tl.pointer_type(DTYPE))
    bases_W1 = tl.multiple_of(bases_W[:, None], [16, 16])
    if NORMS:
        weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    kept = tl.program_id(0)
    at = (first + kept) * WIDTH + columns
    parts, values = _load_row(bases_W1, h, at, kept * WIDTH + columns, inside, kept < num_kept, WORLD, WORLD_BLOCK)
    while kept < num_kept:
        later = kept + num_programs
        later_at = at + num_programs * WIDTH
        later_parts, later_values = _load_row(
            bases_W1, h, later_at, later * WIDTH + columns, inside, later < num_kept, WORLD, WORLD_BLOCK
        )
        total = tl.sum(parts.to(tl.float32), axis=0).to(DTYPE).to(tl.float32)
        x = (values.to(tl.float32) + total).to(DTYPE)
        tl.store(h + kept * WIDTH + columns, x, mask=inside)
        if NORMS:
            added = x.to(tl.float32)
            scale = tl.rsqrt(tl.sum(added * added, axis=0) / WIDTH + eps)
            x = ((added * scale).to(DTYPE).to(tl.float32) * weights).to(DTYPE)
        tl.store(bases_W1 + at[None, :], tl.broadcast_to(x[None, :], (WORLD_BLOCK, BLOCK)), mask=present)
        kept, at, parts, values = later, later_at, later_parts, later_values
    tl.debug_barrier()
    sequence = tl.load(state + _SEQUENCE) + 1
    finished = tl.atomic_add(state + _FINISHED, sequence * 0 + 1, sem="acq_rel", scope="sys")
    if finished == num_programs - 1:
        show(bases, at_done.to(tl.int64) + rank * 8, sequence, WORLD, WORLD_BLOCK)
        _await_all(bases, at_done, rank, sequence, state, host, at_told, timeout_ns, WORLD, LANES, IS_TIMED)
        tl.store(state + _FINISHED, sequence * 0)
        tl.store(state + _SEQUENCE, sequence)


def meet(peers: PeerResidual) -> None:
    """The first half of `peer_residual.add_sums`: all ranks' parts are there."""
    layout = peers.layout
    _meet_kernel[(1,)](
        peers.bases, peers.state, peers.host, peers.timeout_ns, peers.rank, layout.ready, layout.blame,
        WORLD=layout.world, WORLD_BLOCK=triton.next_power_of_2(layout.world), LANES=32 * _WARPS_MEETING,
        IS_TIMED=peers.state.is_cuda, num_warps=_WARPS_MEETING, **early(),
    )  # fmt: skip


def add_sums(
    peers: PeerResidual, h_OD: Tensor, kept: slice, weight_D: Tensor | None, eps: float, num_programs: int
) -> None:
    """The second half, by programs that read from peers and write to them."""
    layout = peers.layout
    _sum_kernel[(max(1, min(num_programs, len(h_OD))),)](
        h_OD, h_OD if weight_D is None else weight_D, peers.bases, peers.state, peers.host, peers.timeout_ns,
        peers.rank, kept.start, len(h_OD), eps, layout.done, layout.blame, WIDTH=layout.hidden,
        BLOCK=triton.next_power_of_2(layout.hidden), WORLD=layout.world,
        WORLD_BLOCK=triton.next_power_of_2(layout.world), DTYPE=_DTYPES[layout.dtype], NORMS=weight_D is not None,
        LANES=32 * _WARPS, IS_TIMED=h_OD.is_cuda, num_warps=_WARPS, **early(),
    )  # fmt: skip
