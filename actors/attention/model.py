"""The forward pass of an attention rank: everything but the routed experts.

Owns the order of a layer's parts and the gate. Attention itself is a function that it is given, routed experts are
reached through dispatch, and the shared expert is computed while they are away. Knows nothing of requests, pages or
processes. Source: transformers' Llama4ForCausalLM.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.attention.upload import mark
from actors.checkpoint.config import ModelConfig
from actors.checkpoint.weights import AttentionWeights, DenseFfn, MoeGate
from actors.config import Routing
from actors.dispatch.contract import Dispatch
from actors.dispatch.tensor_parallel import ALONE, TensorParallel
from actors.kernels.linear import swiglu_ffn
from actors.kernels.norm import add_rms_norm
from actors.kernels.route import choose_experts


def ffn(x_TD: Tensor, weights: DenseFfn) -> Tensor:
    """down(silu(gate(x)) * up(x)): [T, D]; the gate is the first half of the rows of `gate_up_ND`."""
    return swiglu_ffn(x_TD, weights.gate_up_ND, weights.down_DF, weights.gate_up_scale, weights.down_scale)


@dataclass(frozen=True, slots=True)
class Choice:
    """The experts of each token, and the scores that scale their inputs (in the activations' dtype)."""

    expert_ids_TK: Tensor
    scores_TK: Tensor


class Gate:
    """Chooses experts. Logits are fp32 whatever the model's dtype: near ties should not depend on rounding."""

    def __init__(self, config: ModelConfig, routing: Routing) -> None:
        self._num_moe_layers = len(config.moe_layers)
        self._experts_per_token = config.experts_per_token
        self._is_uniform = routing == "uniform"

    def __call__(
        self, x_TD: Tensor, router_ED: Tensor, lot_T: Tensor | None, padding_T1: Tensor | None = None
    ) -> Choice:
        """top-k on raw logits, then the sigmoid of the chosen; nothing is renormalised. `lot_T`: see `draw_lots`."""
        return Choice(*choose_experts(x_TD, router_ED, self._experts_per_token, lot_T, padding_T1))

    def draw_lots(self, positions_T: Tensor) -> Sequence[Tensor | None]:
        """For each MoE layer: None, or with uniform routing a number per row that stands for a random expert."""
        if not self._is_uniform:
            return [None] * self._num_moe_layers
        device = positions_T.device
        rows_T = torch.arange(len(positions_T), device=device)
        layers_M1 = torch.arange(self._num_moe_layers, device=device)[:, None]
        lots_MT = positions_T * 2654435761 + rows_T * 40503 + layers_M1 * 2246822519
        for shift in (15, 13):  # multiply and fold: neighbours in any of the three come apart
            lots_MT = (lots_MT ^ (lots_MT >> shift)).mul_(0x2C1B3C6D).bitwise_and_(0x7FFFFFFF)
        return list(lots_MT)


class Attend(Protocol):
    """Attention of a step: what its rows may see, and where their keys and values are kept, it knows already."""

    def __call__(self, layer: int, qkv_TQ: Tensor) -> Tensor:
        """qkv_TQ, which it may overwrite, to [T, heads * head_dim], before the output projection."""
        ...


class AttentionModel:
    """Weights and their use."""

    def __init__(
        self, config: ModelConfig, weights: AttentionWeights, routing: Routing = "model", tp: TensorParallel = ALONE
    ) -> None:
        """`weights` may be one shard's, and `tp` then joins what its members compute."""
        self._config = config
        self._tp = tp
        self._weights = weights
        embed_VD = weights.embed_VD
        self._eps = config.rms_norm_eps
        self._gate = Gate(config, routing)
        # A CPU adds in the dtype that it multiplies in; a GPU multiplies what is stored and adds in fp32.
        is_cpu = embed_VD.device.type == "cpu"
        self._routers = {
            i: layer.ffn.router_ED.float() if is_cpu else layer.ffn.router_ED
            for i, layer in enumerate(weights.layers)
            if isinstance(layer.ffn, MoeGate)
        }
        # [M, E]: routed tokens since they were last taken, counted on the device.
        self._expert_tokens_ME = torch.zeros(
            len(config.moe_layers), config.num_experts, dtype=torch.int64, device=embed_VD.device
        )

        self._arriving: tuple[Tensor, torch.cuda.Event | None] | None = None

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, attend: Attend, dispatch: Dispatch, padding_T1: Tensor | None = None
    ) -> Tensor:
        """h_TD: hidden states after the last layer, before the final norm. T is at least 1.

        Rows where `padding_T1` is set go to no expert. What becomes of them does not matter.
        """
        h_TD = F.embedding(ids_T, self._weights.embed_VD)
        lots = iter(self._gate.draw_lots(positions_T))
        chosen: list[Tensor] = []
        deltas: tuple[Tensor, ...] = ()  # not yet added to h; partial sums where attention is tensor-parallel
        for i, layer in enumerate(self._weights.layers):
            x_TD = self._tp.add_rms_norm(h_TD, deltas, layer.input_norm_D, self._eps)
            out_TA = attend(i, F.linear(x_TD, layer.wqkv_QD))
            out_TD = F.linear(out_TA, layer.wo_DA)
            x_TD = self._tp.add_rms_norm(h_TD, (out_TD,), layer.post_norm_D, self._eps)
            if isinstance(layer.ffn, DenseFfn):
                deltas = (ffn(x_TD, layer.ffn),)
            else:
                choice = self._gate(x_TD, self._routers[i], next(lots), padding_T1)
                chosen.append(choice.expert_ids_TK)
                deltas = self._moe(i, x_TD, layer.ffn, choice, dispatch)
        self._count(chosen)
        self._tp.add_all_reduced(h_TD, deltas)
        return h_TD

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Until it ends partial sums are taken for the sums (peers need not do the same), and no token counts."""
        tp, self._tp = self._tp, ALONE
        try:
            yield
        finally:
            self._tp = tp
            self._expert_tokens_ME.zero_()

    def logits(self, h_BD: Tensor) -> Tensor:
        """fp32 [B, V] of rows of `forward`'s result."""
        x_BD = add_rms_norm(h_BD, (), self._weights.final_norm_D, self._eps)
        return self._tp.all_gather_columns(F.linear(x_BD, self._weights.lm_head_VD)).float()

    def empty_logits(self, num_rows: int) -> Tensor:
        """Room for the logits of so many rows, [num_rows, V] in the model's dtype."""
        return self._weights.lm_head_VD.new_empty(num_rows, self._config.vocab_size)

    def write_logits(self, h_BD: Tensor, out_BV: Tensor) -> None:
        """The logits of `forward`'s rows into memory that is there already."""
        x_BD = add_rms_norm(h_BD, (), self._weights.final_norm_D, self._eps)
        if self._tp.size == 1:
            part_VD = self._weights.lm_head_VD
            torch.mm(x_BD, part_VD.t(), out=out_BV[:, : part_VD.shape[0]])
        else:
            out_BV.copy_(self._tp.all_gather_columns(F.linear(x_BD, self._weights.lm_head_VD)))

    def request_expert_tokens(self) -> None:
        """Starts to fetch the tokens routed to each expert since the last request, without waiting for the device."""
        if self._arriving is not None:
            return
        counts_ME = self._expert_tokens_ME.to("cpu", non_blocking=True, copy=True)
        self._expert_tokens_ME.zero_()
        self._arriving = (counts_ME, mark(self._expert_tokens_ME.device))

    def take_expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """What was requested, by MoE layer, if it is here; else nothing."""
        if self._arriving is None:
            return {}
        counts_ME, event = self._arriving
        if event is not None and not event.query():
            return {}
        self._arriving = None
        return {layer: tuple(row) for layer, row in zip(self._config.moe_layers, counts_ME.tolist(), strict=True)}

    def _moe(self, i: int, x_TD: Tensor, moe: MoeGate, choice: Choice, dispatch: Dispatch) -> tuple[Tensor, Tensor]:
        """What the shared and the routed experts add to the hidden states."""
        receipt = dispatch.dispatch(x_TD, choice.expert_ids_TK, choice.scores_TK, i)
        shared_TD = ffn(x_TD, moe.shared)
        return shared_TD, dispatch.combine(receipt)

    def _count(self, chosen: list[Tensor]) -> None:
        if chosen:
            ids_MN = torch.stack(chosen).flatten(1)
            self._expert_tokens_ME.scatter_add_(1, ids_MN.clamp(min=0), (ids_MN >= 0).long())
