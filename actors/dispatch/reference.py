"""The slow, obvious dispatch: the oracle of every other one.

Owns the meaning of dispatch and combine, one token and one expert at a time. Knows nothing of ranks: it is given all
experts, whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.dispatch.contract import Receipt

ExpertFunction = Callable[[Tensor], Tensor]
"""One expert: [1, D] -> [1, D]."""


@dataclass(frozen=True, slots=True)
class ReferenceReceipt:
    x_TD: Tensor
    expert_ids_TK: Tensor
    scores_TK: Tensor
    layer: int


class ReferenceDispatch:
    """y_t = sum over k of expert[layer][id_tk](score_tk * x_t), exactly as it is written."""

    is_capturable = False

    def __init__(self, experts: dict[int, list[ExpertFunction]]) -> None:
        self._experts = experts

    def begin_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """Has nothing to prepare."""

    def end_step(self) -> None:
        """Has nothing to wait for."""

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, layer: int) -> ReferenceReceipt:
        return ReferenceReceipt(x_TD, expert_ids_TK, scores_TK, layer)

    def combine(self, receipt: Receipt) -> Tensor:
        assert isinstance(receipt, ReferenceReceipt), "receipts belong to the dispatch that made them"
        y_TD = torch.zeros_like(receipt.x_TD)
        for t in range(receipt.x_TD.shape[0]):
            for k in range(receipt.expert_ids_TK.shape[1]):
                expert = self._experts[receipt.layer][int(receipt.expert_ids_TK[t, k])]
                y_TD[t] += expert(receipt.scores_TK[t, k] * receipt.x_TD[t : t + 1])[0]
        return y_TD
