"""What stands for the experts of an epoch before there is one.

Owns the steps that are run on nobody's requests when weights are loaded, and where their tokens go: to this process's
own experts, if it has any, whatever their number. Knows nothing of peers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from actors.dispatch.contract import ExpertCompute, Receipt

SIZES = (17, 64, 500, 2048)  # tokens of prompts: kernels are chosen, and some compiled, by the number of rows


def rehearsed_sizes(max_tokens: int) -> list[int]:
    """Tokens of the prompts that are computed, the largest step last."""
    return [*(size for size in SIZES if size < max_tokens), max_tokens]


def rehearsed_prompts(num_tokens: int, longest_tokens: int) -> list[int]:
    """Lengths of the prompts that make a step of `num_tokens`, none of them longer than a request may be."""
    whole, rest = divmod(num_tokens, longest_tokens)
    return [longest_tokens] * whole + ([rest] if rest else [])


def rehearsed_rows(max_rows: int) -> list[int]:
    """Rows of one token of steps that are not captured, since others have prompts: kernels go by powers of two."""
    return [*(1 << i for i in range(max_rows.bit_length()) if 1 << i < max_rows), max_rows]


class RehearsalDispatch:
    """Implements Dispatch with this process alone. Without experts the result is zeros."""

    is_capturable = True

    def __init__(
        self, experts: ExpertCompute | None, num_slots: Mapping[int, int], num_experts: int, device: torch.device
    ) -> None:
        self._experts = experts
        self._slots_of_layer = {
            layer: torch.arange(num_experts, device=device) % num for layer, num in num_slots.items() if num
        }

    def begin_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """Has no messages to bound."""

    def end_step(self) -> None:
        """Has no peers to lose."""

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, layer: int) -> Receipt:
        return x_TD, expert_ids_TK, scores_TK, layer

    def combine(self, receipt: Receipt) -> Tensor:
        x_TD, expert_ids_TK, scores_TK, layer = receipt
        if self._experts is None or layer not in self._slots_of_layer:
            return torch.zeros_like(x_TD)
        return self._experts.routed(layer, x_TD, expert_ids_TK, scores_TK, self._slots_of_layer[layer])
