"""Who computes an expert that several ranks hold: chosen in every step, so that the busiest rank reads few experts.

Owns the choice. At small batches a step waits for the rank that reads most distinct experts; all tokens of an expert go
to one holder, and every rank chooses alike from the same tokens, without asking. Knows nothing of layers.
"""

import torch
from torch import Tensor

from actors.kernels.triton_here import HAS_TRITON, tl, triton

_CHUNK_IDS = 32


def choose_slots(ids_N: Tensor, holders_E: Tensor, slots_EW: Tensor) -> Tensor:
    """int64 [E]: slots here of the experts that this rank computes in this step; -1 for all others.

    ids_N: int64, experts of the step's rows, -1 in rows that go nowhere. holders_E: int64, bit r is set where rank r of
    W (at most 32) holds the expert; one is. slots_EW: int64, the slot here where w is this rank, else -1. Experts with
    one holder count first, then the others go in ascending order, each to the holder that has fewest by then, of equals
    to the lowest.
    """
    if ids_N.is_cuda and HAS_TRITON:
        return _with_triton(ids_N, holders_E, slots_EW)
    chosen_E = _choose(ids_N, holders_E, slots_EW.shape[1])
    return slots_EW.gather(1, chosen_E.clamp(min=0)[:, None])[:, 0].where(chosen_E >= 0, -1)


def _choose(ids_N: Tensor, holders_E: Tensor, num_ranks: int) -> Tensor:
    """[E]: the rank that computes each expert; -1 for those that no row goes to."""
    present = sorted(set(ids_N.tolist()) - {-1})
    holders = {expert: [r for r in range(num_ranks) if int(holders_E[expert]) >> r & 1] for expert in present}
    loads = [0] * num_ranks
    chosen_E = torch.full_like(holders_E, -1)
    for expert in sorted(present, key=lambda expert: (len(holders[expert]) > 1, expert)):
        rank = min(holders[expert], key=lambda rank: (loads[rank], rank))
        chosen_E[expert] = rank
        loads[rank] += 1
    return chosen_E


if HAS_TRITON:

    @triton.jit(do_not_specialize=["num_ids"])  # type: ignore[untyped-decorator]
    def _choose_kernel(
        ids, holders, slots, chosen, num_ids, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr,
        NUM_RANKS: tl.constexpr, RANKS: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """One program of one warp: nothing in its loops needs a barrier. EXPERTS and RANKS are powers of 2."""
        experts = tl.arange(0, EXPERTS)
        ranks = tl.arange(0, RANKS)
        rows = tl.arange(0, CHUNK)
        present = experts < 0
        first = num_ids * 0
        while first < num_ids:
            known = tl.load(ids + first + rows, mask=first + rows < num_ids, other=-1).to(tl.int32)
            hits = (known[:, None] == experts[None, :]).to(tl.int32)
            present = present | (tl.max(hits, axis=0) > 0)
            first += CHUNK
        held = tl.load(holders + experts, mask=experts < NUM_EXPERTS, other=0).to(tl.int32)
        is_held = (held[None, :] >> ranks[:, None]) & 1
        is_single = present & (tl.sum(is_held, axis=0) == 1)
        of_one = is_held * is_single.to(tl.int32)[None, :]
        loads = tl.sum(of_one, axis=1)
        picked = tl.where(is_single, tl.sum(of_one * ranks[:, None], axis=0), -1)
        waiting = present & (is_single == 0)
        expert = tl.min(tl.where(waiting, experts, EXPERTS), axis=0)
        while expert < EXPERTS:
            mask = tl.sum(tl.where(experts == expert, held, 0), axis=0)
            cost = tl.where(((mask >> ranks) & 1) != 0, loads * RANKS + ranks, 1 << 30)
            rank = tl.min(cost, axis=0) % RANKS
            picked = tl.where(experts == expert, rank, picked)
            loads += (ranks == rank).to(tl.int32)
            waiting = waiting & (experts > expert)
            expert = tl.min(tl.where(waiting, experts, EXPERTS), axis=0)
        slot = tl.load(slots + experts * NUM_RANKS + picked, mask=picked >= 0, other=-1)
        tl.store(chosen + experts, slot, mask=experts < NUM_EXPERTS)


def _with_triton(ids_N: Tensor, holders_E: Tensor, slots_EW: Tensor) -> Tensor:
    chosen_E = torch.empty_like(holders_E)
    num_experts, num_ranks = slots_EW.shape
    _choose_kernel[(1,)](
        ids_N, holders_E, slots_EW, chosen_E, ids_N.numel(), NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts), NUM_RANKS=num_ranks, RANKS=triton.next_power_of_2(num_ranks),
        CHUNK=_CHUNK_IDS, num_warps=1,
    )  # fmt: skip
    return chosen_E
