"""Dispatch inside one process: index and call.

Owns the path of tokens when every expert lives beside the attention. Knows nothing of groups or other ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.dispatch.beside import ExpertsBeside, RoutedReceipt
from actors.dispatch.contract import ExpertCompute, Receipt, RoutingTable


@dataclass(frozen=True, slots=True)
class LocalReceipt:
    """Scaled rows (token-major, K of each token in a row) and the slots they go to."""

    rows_ND: Tensor
    slots_N: Tensor
    layer: int
    experts_per_token: int


class LocalDispatch:
    """Hands tokens to the experts of this process.

    Raises ValueError if the routing table names more than one rank.
    """

    def __init__(self, experts: ExpertCompute, routing: RoutingTable) -> None:
        ranks = torch.unique(routing.ranks_MER)
        if ranks.numel() > 1:
            raise ValueError(f"experts are spread over ranks {ranks.tolist()}; local dispatch reaches one")
        self.is_capturable = True
        self._experts = experts
        self._beside = ExpertsBeside(experts, routing.slots_MER.device)
        # Replicas inside one process share its speed: the first one serves.
        self._slots_of_layer = dict(zip(routing.layers, routing.slots_MER[:, :, 0].contiguous(), strict=True))

    def begin_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """Has no messages to bound."""

    def end_step(self) -> None:
        """Has no peers to lose."""

    def update(self, routing: RoutingTable) -> None:
        """Takes another table of the same layers and experts, in place: captured graphs follow it."""
        for layer, slots_E in zip(routing.layers, routing.slots_MER[:, :, 0], strict=True):
            self._slots_of_layer[layer].copy_(slots_E)

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, layer: int) -> Receipt:
        if x_TD.is_cuda:  # which scales, sorts and quantizes rows in one kernel, and puts them back in another
            return self._beside.start(layer, x_TD, expert_ids_TK, scores_TK, self._slots_of_layer[layer])
        K = expert_ids_TK.shape[1]
        ids_N = expert_ids_TK.flatten()
        slots_N = self._slots_of_layer[layer].index_select(0, ids_N.clamp(min=0)).masked_fill_(ids_N < 0, -1)
        rows_ND = x_TD * scores_TK if K == 1 else (x_TD[:, None] * scores_TK[..., None]).flatten(0, 1)
        return LocalReceipt(rows_ND, slots_N, layer, K)

    def combine(self, receipt: Receipt) -> Tensor:
        if isinstance(receipt, RoutedReceipt):
            return self._beside.finish(receipt)
        assert isinstance(receipt, LocalReceipt), "receipts belong to the dispatch that made them"
        y_ND = self._experts(receipt.layer, receipt.rows_ND, receipt.slots_N)
        K = receipt.experts_per_token
        return y_ND if K == 1 else y_ND.view(-1, K, y_ND.shape[1]).sum(1)
