"""What the tests of symmetric dispatch on GPUs share: experts that can be captured, tokens, what should come out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from actors.dispatch.contract import RoutingTable, build_routing_table
from actors.dispatch.rows import TokenShape, scale_rows

LAYERS = (1, 3, 5)  # an odd number of them: the hardest for double buffering
NUM_EXPERTS = 6
Slots = dict[int, dict[int, tuple[int, ...]]]


class Layout(NamedTuple):
    attention: tuple[int, ...]
    slots: Slots

    @property
    def world(self) -> int:
        return max(*self.attention, *self.slots) + 1

    def routing(self, device: torch.device) -> RoutingTable:
        return build_routing_table(self.slots, LAYERS, NUM_EXPERTS, device)


def spread(expert_ranks: tuple[int, ...], replicas: int = 1) -> Slots:
    """Experts dealt out in turn, so that ranks have uneven numbers of them; replica r is r ranks further on."""
    ranks = len(expert_ranks)
    return {
        rank: {
            layer: tuple(e for e in range(NUM_EXPERTS) if any((e + layer + r) % ranks == i for r in range(replicas)))
            for layer in LAYERS
        }
        for i, rank in enumerate(expert_ranks)
    }


class Tokens(NamedTuple):
    x_TD: Tensor
    ids_TK: Tensor
    scores_TK: Tensor


def random_tokens(num_tokens: int, shape: TokenShape, seed: int, hot: bool = False, padding: int = 0) -> Tokens:
    """Of which the last `padding` route nowhere, and all want expert 2 first if `hot`."""
    rng = torch.Generator().manual_seed(seed)
    weights_TE = torch.rand(num_tokens, NUM_EXPERTS, generator=rng)
    if hot:
        weights_TE[:, 2] = -1
    ids_TK = weights_TE.argsort(1)[:, : shape.experts_per_token]
    ids_TK[num_tokens - padding :] = -1
    x_TD = torch.randn(num_tokens, shape.hidden, generator=rng)
    scores_TK = torch.rand(num_tokens, shape.experts_per_token, generator=rng)
    return Tokens(x_TD.to(shape.device, shape.dtype), ids_TK.to(shape.device), scores_TK.to(shape.device, shape.dtype))


class Experts:
    """y = x * a + b with an a and a b of each layer and expert: quick, exact, and every expert and every row tells.

    What it returns for padding is not a number. `num_rows` counts the others, on the device: nothing here waits for the
    host.
    """

    def __init__(self, shape: TokenShape, slots: dict[int, tuple[int, ...]]) -> None:
        self._experts_of_layer = {
            layer: torch.tensor(experts, device=shape.device) for layer, experts in slots.items() if experts
        }
        self.num_rows = torch.zeros((), dtype=torch.int64, device=shape.device)
        self._nan = torch.tensor(torch.nan, device=shape.device)

    def __call__(self, layer: int, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        self.num_rows += (slots_N >= 0).sum()
        experts_N = self._experts_of_layer[layer].index_select(0, slots_N.clamp(min=0))
        y_ND = compute(layer, x_ND, experts_N)
        return torch.where(slots_N[:, None] >= 0, y_ND, self._nan).to(x_ND.dtype)


def compute(layer: int, x_ND: Tensor, experts_N: Tensor) -> Tensor:
    numbers_N1 = (experts_N[:, None] + layer * NUM_EXPERTS).float()
    return (x_ND.float() * (1 + numbers_N1 / 8) + numbers_N1).to(x_ND.dtype)


def expected(layer: int, tokens: Tokens) -> Tensor:
    """What `combine` returns, for K of 1 or 2 to the bit; zeros where a token routes nowhere."""
    K, ids_N = tokens.ids_TK.shape[1], tokens.ids_TK.flatten()
    y_ND = compute(layer, scale_rows(tokens.x_TD, tokens.scores_TK), ids_N).masked_fill(ids_N[:, None] < 0, 0)
    return y_ND.float().view(-1, K, y_ND.shape[1]).sum(1).to(y_ND.dtype)


def counts_of(layout: Layout, numbers: Sequence[int]) -> tuple[int, ...]:
    """Tokens of every rank, where the attention ranks bring `numbers`."""
    of_rank = dict(zip(layout.attention, numbers, strict=False))
    return tuple(of_rank.get(rank, 0) for rank in range(layout.world))
