"""The forward pass of an attention rank: everything but the routed experts.

Owns the order of a layer's parts and the gate. Attention itself is a function that it is given, routed experts are
reached through dispatch, and the shared expert is computed while they are away. Knows nothing of requests, pages or
processes. Source: transformers' Llama4ForCausalLM.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.attention.beside import Beside
from actors.attention.logits import Logits
from actors.attention.upload import mark
from actors.checkpoint.config import ModelConfig
from actors.checkpoint.weights import AttentionWeights, DenseFfn, MoeGate
from actors.config import Routing
from actors.dispatch.contract import Dispatch
from actors.dispatch.residual import Residual
from actors.dispatch.tensor_parallel import ALONE, TensorParallel
from actors.kernels.draw import Draws
from actors.kernels.linear import linear, swiglu_ffn
from actors.kernels.norm import add_rms_norm
from actors.kernels.route import GateScratch, choose_experts, draw_lots


def ffn(x_TD: Tensor, weights: DenseFfn, room_TD: Tensor | None = None) -> Tensor:
    """down(silu(gate(x)) * up(x)): [T, D]; the gate is the first half of the rows of `gate_up_ND`. `room_TD`: see
    `swiglu_ffn`.
    """
    return swiglu_ffn(x_TD, weights.gate_up_ND, weights.down_DF, weights.gate_up_scale, weights.down_scale, room_TD)


@dataclass(frozen=True, slots=True)
class Choice:
    """The experts of each token, and the scores that scale their inputs (in the activations' dtype)."""

    expert_ids_TK: Tensor
    scores_TK: Tensor


class Gate:
    """Chooses experts. Logits are fp32 whatever the model's dtype: near ties should not depend on rounding."""

    def __init__(self, config: ModelConfig, routing: Routing, device: torch.device) -> None:
        self._num_moe_layers = len(config.moe_layers)
        self._experts_per_token = config.experts_per_token
        self._is_uniform = routing == "uniform"
        self._scratch = GateScratch(device)

    def __call__(
        self,
        x_TD: Tensor,
        router_ED: Tensor,
        lot_T: Tensor | None,
        padding_T1: Tensor | None = None,
        counts_E: Tensor | None = None,
    ) -> Choice:
        """top-k on raw logits, then the sigmoid of the chosen; nothing is renormalised. Adds the tokens of each expert
        to `counts_E`. `lot_T`: see `draw_lots`.
        """
        top_k = self._experts_per_token
        return Choice(*choose_experts(x_TD, router_ED, top_k, lot_T, padding_T1, counts_E, self._scratch))

    def draw_lots(self, positions_T: Tensor) -> Sequence[Tensor | None]:
        """For each MoE layer: None, or with uniform routing a number per row that stands for a random expert."""
        if not self._is_uniform:
            return [None] * self._num_moe_layers
        return list(draw_lots(positions_T, self._num_moe_layers))


class Attend(Protocol):
    """Attention of a step: what its rows may see, and where their keys and values are kept, it knows already."""

    def __call__(self, layer: int, qkv_TQ: Tensor) -> Tensor:
        """qkv_TQ, which it may overwrite, to [T, heads * head_dim], before the output projection."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a step, and their attention, which reads nothing that later parts write."""

    rows: slice
    attend: Attend


Stages = Generator[None, None, Tensor]
"""A micro-batch on its way through the layers; it stops wherever another may be computed meanwhile."""


def run_in_turn(runs: Sequence[Stages]) -> list[Tensor]:
    """What each returns. All stop equally often; each goes on to its next stop before the one after it does."""
    results: list[Tensor] = []
    while len(results) < len(runs):
        for run in runs:
            try:
                next(run)
            except StopIteration as end:
                results.append(end.value)
    return results


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
        self._gate = Gate(config, routing, embed_VD.device)
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
        self._beside = Beside(embed_VD.device)

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, attend: Attend, dispatch: Dispatch, padding_T1: Tensor | None = None
    ) -> Tensor:
        """h_TD: hidden states after the last layer, before the final norm. T is at least 1.

        Rows where `padding_T1` is set go to no expert. What becomes of them does not matter.
        """
        return run_in_turn([self.stages(ids_T, positions_T, attend, dispatch, padding_T1)])[0]

    def stages(
        self, ids_T: Tensor, positions_T: Tensor, attend: Attend, dispatch: Dispatch, padding_T1: Tensor | None = None
    ) -> Stages:
        """As `forward`, but stops in every MoE layer while its tokens are at their experts."""
        h_TD = F.embedding(ids_T, self._weights.embed_VD)
        gating = zip(self._gate.draw_lots(positions_T), self._expert_tokens_ME, strict=True)
        deltas: tuple[Tensor, ...] = ()  # not yet added to h; partial sums where attention is tensor-parallel
        for i, layer in enumerate(self._weights.layers):
            x_TD = self._tp.add_rms_norm(h_TD, deltas, layer.input_norm_D, self._eps)
            out_TA = attend(i, linear(x_TD, layer.wqkv_QD))
            out_TD = linear(out_TA, layer.wo_DA)
            x_TD = self._tp.add_rms_norm(h_TD, (out_TD,), layer.post_norm_D, self._eps)
            if isinstance(layer.ffn, DenseFfn):
                deltas = (ffn(x_TD, layer.ffn),)
            else:
                deltas = yield from self._moe(i, x_TD, layer.ffn, next(gating), padding_T1, dispatch)
        self._tp.add_all_reduced(h_TD, deltas)
        return h_TD

    def _moe(
        self, i: int, x_TD: Tensor, moe: MoeGate, gating: tuple[Tensor | None, Tensor], padding_T1: Tensor | None,
        dispatch: Dispatch,
    ) -> Generator[None, None, tuple[Tensor, Tensor]]:  # fmt: skip
        """What the shared and the routed experts add to the hidden states. Stops while tokens are away."""
        lot_T, counts_E = gating
        choice = self._gate(x_TD, self._routers[i], lot_T, padding_T1, counts_E)
        receipt = dispatch.dispatch(x_TD, choice.expert_ids_TK, choice.scores_TK, i)
        # Not before the gate: a large matmul leaves no multiprocessor to it, and all would wait for the routed experts.
        shared = self._beside.start(partial(ffn, weights=moe.shared), x_TD)
        yield
        return shared(), dispatch.combine(receipt)

    @property
    def min_large_rows(self) -> int:
        """Steps of so many rows and more, which are not captured, are for `forward_in_parts`."""
        return self._tp.min_large_rows

    def forward_in_parts(self, ids_T: Tensor, positions_T: Tensor, parts: Sequence[Part], dispatch: Dispatch) -> Tensor:
        """As `forward`, for steps of many rows: while what ranks have computed of a part's rows is summed, they compute
        another part. Routed experts take all rows at once, since each of their weights is read but once then.

        What is returned holds until the next call.
        """
        layers = self._weights.layers
        all_rows = [part.rows for part in parts]
        h_TD = F.embedding(ids_T, self._weights.embed_VD)
        residual = self._tp.residual(all_rows, h_TD, layers[0].input_norm_D, self._eps)
        gating = zip(self._gate.draw_lots(positions_T), self._expert_tokens_ME, strict=True)
        for i, layer in enumerate(layers):
            for part in parts:
                residual.wait(part.rows)
                x_RD = residual.x_TD[part.rows]
                out_RA = part.attend(i, F.linear(x_RD, layer.wqkv_QD))
                residual.add(part.rows, (torch.mm(out_RA, layer.wo_DA.t(), out=x_RD),), layer.post_norm_D)
            next_norm_D = layers[i + 1].input_norm_D if i + 1 < len(layers) else None
            if isinstance(layer.ffn, DenseFfn):
                for rows in all_rows:
                    residual.wait(rows)
                    x_RD = residual.x_TD[rows]
                    residual.add(rows, (ffn(x_RD, layer.ffn, room_TD=x_RD),), next_norm_D)
            else:
                self._moe_in_parts(i, residual, all_rows, layer.ffn, next(gating), next_norm_D, dispatch)
        residual.finish()
        return residual.x_TD

    def _moe_in_parts(
        self, i: int, residual: Residual, all_rows: Sequence[slice], moe: MoeGate,
        gating: tuple[Tensor | None, Tensor], next_norm_D: Tensor | None, dispatch: Dispatch,
    ) -> None:  # fmt: skip
        """The first part's shared expert runs beside the last sums that the routed ones need; those of the other parts
        come after these, beside the first sums of what they gave.
        """
        first, *others = all_rows
        residual.wait(first)
        shared_RD = ffn(residual.x_TD[first], moe.shared)
        for rows in others:
            residual.wait(rows)
        lot_T, counts_E = gating
        choice = self._gate(residual.x_TD, self._routers[i], lot_T, None, counts_E)
        receipt = dispatch.dispatch(residual.x_TD, choice.expert_ids_TK, choice.scores_TK, i)
        routed_TD = dispatch.combine(receipt)
        residual.add(first, (shared_RD, routed_TD[first]), next_norm_D)
        for rows in others:
            residual.add(rows, (ffn(residual.x_TD[rows], moe.shared), routed_TD[rows]), next_norm_D)

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

    def step_logits(self, h_BD: Tensor) -> Logits:
        """The logits of rows of `forward`'s result, to sample from."""
        return self.write_logits(h_BD, self.empty_logits(h_BD.shape[0]))

    def empty_logits(self, num_rows: int) -> Tensor:
        """Room for this rank's columns of the logits of so many rows, [num_rows, C] in the model's dtype."""
        return self._weights.lm_head_VD.new_empty(num_rows, self._weights.lm_head_VD.shape[0])

    def write_logits(self, h_BD: Tensor, part_BC: Tensor) -> Logits:
        """The logits of `forward`'s rows; this rank's columns go into memory that is there already."""
        x_BD = add_rms_norm(h_BD, (), self._weights.final_norm_D, self._eps)
        torch.mm(x_BD, self._weights.lm_head_VD.t(), out=part_BC)
        return Logits(part_BC, *self._tp.largest_columns(part_BC), self._gather, self._draw)

    def _gather(self, part_RC: Tensor) -> Tensor:
        return self._tp.all_gather_columns(part_RC)

    def _draw(self, part_BC: Tensor, draws: Draws) -> Tensor:
        return self._tp.draw_columns(part_BC, draws)

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
