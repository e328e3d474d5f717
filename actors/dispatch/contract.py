"""The one contract of dispatch: how tokens travel to their experts and back.

Owns the interface and the routing table. Every implementation equals `reference.py`. Knows nothing of requests,
positions or layers' weights: experts are reached through `ExpertCompute`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from actors.types import EMPTY_SLOT


class ExpertCompute(Protocol):
    """What dispatch asks of the experts that live in this process (implemented by `actors/expert`)."""

    def __call__(self, layer: int, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        """Runs row n through the expert in slot `slots_N[n]` (int64 in [0, slots)) of `layer`.

        x_ND is already scaled by the router score. Rows with slot -1 are padding: their output is not read. N may
        be 0. Returns y_ND in x's dtype.
        """
        ...

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, slot_of_E: Tensor) -> Tensor:
        """y_TD = sum over k of expert_k(score_k * x) over the experts that `slot_of_E` (int64 [E]) gives a slot.

        An id of -1 is padding; a slot of -1, an expert that is elsewhere: both count as zeros.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """Expert -> replicas of one epoch, as tensors, so that choosing needs no Python per token.

    M MoE layers (in ascending order of layer), E experts, R the largest number of replicas.
    `ranks_MER`, `slots_MER`: int64, rank and slot of replica r of expert e; unused entries repeat valid ones.
    `num_replicas_ME`: int64, at least 1.
    """

    layers: tuple[int, ...]
    ranks_MER: Tensor
    slots_MER: Tensor
    num_replicas_ME: Tensor


Receipt = Any
"""What `dispatch` hands to `combine`: each implementation's own, opaque to the caller, used once."""


class Dispatch(Protocol):
    """Moves tokens to experts and results back, by gate score.

    x_TD: [T, D] activations. expert_ids_TK: int64 [T, K], the chosen experts, distinct within a row; -1 in all of a
    padding row's, which only a capturable dispatch is given: it goes nowhere, and its result is not read.
    scores_TK: [T, K], sigmoid scores; the score scales the expert's INPUT. T may be 0.
    `combine` returns y_TD = sum over k of expert_k(score_k * x), in x's dtype.
    Between the two calls the caller may compute what does not depend on the experts (the shared expert).
    Raises RankError when a peer fails or does not answer in time; the epoch is over then.
    """

    @property
    def is_capturable(self) -> bool:
        """Whether all that it does in the step that was begun can be captured in a CUDA graph."""
        ...

    def begin_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """States the step's tokens of every rank of the epoch, before its first dispatch."""
        ...

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, layer: int) -> Receipt: ...

    def combine(self, receipt: Receipt) -> Tensor: ...

    def end_step(self) -> None:
        """To be called after the last combine, before anything that the step computed is believed: where a lost peer
        shows on the device alone, it waits for the device. Raises RankError.
        """
        ...


def build_routing_table(
    slots_of_rank: dict[int, dict[int, tuple[int, ...]]],
    moe_layers: tuple[int, ...],
    num_experts: int,
    device: torch.device,
) -> RoutingTable:
    """Inverts `slots_of_rank[rank][layer] = (expert of slot 0, …)`; EMPTY_SLOT is no expert.

    Raises ValueError if an expert has no slot.
    """
    holders: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank in sorted(slots_of_rank):
        for layer, experts in slots_of_rank[rank].items():
            for slot, expert in enumerate(experts):
                if expert != EMPTY_SLOT:
                    holders.setdefault((layer, expert), []).append((rank, slot))
    missing = [(la, e) for la in moe_layers for e in range(num_experts) if (la, e) not in holders]
    if missing:
        raise ValueError(f"no rank holds expert {missing[0][1]} of layer {missing[0][0]} ({len(missing)} missing)")
    widest = max((len(h) for h in holders.values()), default=1)
    table = [
        [[holders[la, e][r % len(holders[la, e])] for r in range(widest)] for e in range(num_experts)]
        for la in moe_layers
    ]
    pairs_MER2 = torch.tensor(table, dtype=torch.int64).reshape(len(moe_layers), num_experts, widest, 2)
    counts = [[len(holders[la, e]) for e in range(num_experts)] for la in moe_layers]
    return RoutingTable(
        layers=moe_layers,
        ranks_MER=pairs_MER2[..., 0].contiguous().to(device),
        slots_MER=pairs_MER2[..., 1].contiguous().to(device),
        num_replicas_ME=torch.tensor(counts, dtype=torch.int64).reshape(len(moe_layers), num_experts).to(device),
    )
