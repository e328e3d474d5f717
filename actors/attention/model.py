"""The forward pass of an attention rank: everything but the routed experts.

Owns the order of a layer's parts and the gate. Routed experts are reached through dispatch, and the shared expert is
computed while they are away. Knows nothing of requests, pages or processes. Source: transformers' Llama4ForCausalLM.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.attention.attention import Attention
from actors.attention.batch import StepInputs
from actors.attention.kv_cache import KvCache
from actors.attention.norm import RowNorm
from actors.checkpoint.config import ModelConfig
from actors.checkpoint.weights import AttentionWeights, DenseFfn, LayerWeights, MoeGate
from actors.config import Routing
from actors.dispatch.contract import Dispatch


def swiglu(x_TD: Tensor, gate_up_ND: Tensor) -> Tensor:
    """silu(gate(x)) * up(x): [T, F]; the gate is the first half of the rows of `gate_up_ND`."""
    gate_TF, up_TF = F.linear(x_TD, gate_up_ND).chunk(2, dim=1)
    return F.silu(gate_TF).mul_(up_TF)


@dataclass(frozen=True, slots=True)
class Choice:
    """The experts of each token, and the scores that scale their inputs (in the activations' dtype)."""

    expert_ids_TK: Tensor
    scores_TK: Tensor


class Gate:
    """Chooses experts. Logits are fp32 whatever the model's dtype: near ties should not depend on rounding."""

    def __init__(self, config: ModelConfig, routing: Routing) -> None:
        self._num_experts = config.num_experts
        self._experts_per_token = config.experts_per_token
        self._is_uniform = routing == "uniform"

    def __call__(self, x_TD: Tensor, router_ED: Tensor, positions_T: Tensor) -> Choice:
        """top-k on raw logits, then the sigmoid of the chosen; nothing is renormalised. `router_ED` is fp32."""
        logits_TE = F.linear(x_TD.float(), router_ED)
        if self._is_uniform:
            expert_ids_TK = self._uniform_ids(positions_T)
            values_TK = logits_TE.gather(1, expert_ids_TK)
        else:
            values_TK, expert_ids_TK = logits_TE.topk(self._experts_per_token, dim=1)
        return Choice(expert_ids_TK, values_TK.sigmoid().to(x_TD.dtype))

    def _uniform_ids(self, positions_T: Tensor) -> Tensor:
        """Experts in turn by token position: the balanced load of a benchmark, not the model's answer."""
        offsets_K = torch.arange(self._experts_per_token, device=positions_T.device)
        return (positions_T[:, None] * self._experts_per_token + offsets_K) % self._num_experts


class AttentionModel:
    """Weights and their use. `forward` writes the step's keys and values into `cache`."""

    def __init__(self, config: ModelConfig, weights: AttentionWeights, routing: Routing = "model") -> None:
        self._config = config
        self._weights = weights
        self._attention = Attention(config)
        embed_VD = weights.embed_VD
        self._norm = RowNorm(config.hidden_size, config.rms_norm_eps, embed_VD.dtype, embed_VD.device)
        self._gate = Gate(config, routing)
        self._routers = {
            i: layer.ffn.router_ED.float() for i, layer in enumerate(weights.layers) if isinstance(layer.ffn, MoeGate)
        }
        # [M, E]: routed tokens since they were last taken, counted on the device.
        self._expert_tokens_ME = torch.zeros(
            len(config.moe_layers), config.num_experts, dtype=torch.int64, device=embed_VD.device
        )

    def forward(self, inputs: StepInputs, cache: KvCache, dispatch: Dispatch) -> Tensor:
        """h_TD: hidden states after the last layer, before the final norm. T is at least 1."""
        self._clear_fresh_pages(inputs, cache)
        h_TD = F.embedding(inputs.ids_T, self._weights.embed_VD)
        chosen: list[Tensor] = []
        for i, layer in enumerate(self._weights.layers):
            self._add_attention(i, layer, h_TD, inputs, cache)
            x_TD = self._norm(h_TD, layer.post_norm_D)
            if isinstance(layer.ffn, DenseFfn):
                _add_ffn(h_TD, x_TD, layer.ffn)
            else:
                chosen.append(self._add_moe(i, h_TD, x_TD, layer.ffn, inputs, dispatch))
        self._count(chosen)
        return h_TD

    def logits(self, h_BD: Tensor) -> Tensor:
        """fp32 [B, V] of rows of `forward`'s result."""
        x_BD = self._norm(h_BD, self._weights.final_norm_D)
        return F.linear(x_BD, self._weights.lm_head_VD).float()

    def take_expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """Tokens routed to each expert of each MoE layer since the last call. Waits for the device."""
        counts = self._expert_tokens_ME.tolist()
        self._expert_tokens_ME.zero_()
        return {layer: tuple(row) for layer, row in zip(self._config.moe_layers, counts, strict=True)}

    def _clear_fresh_pages(self, inputs: StepInputs, cache: KvCache) -> None:
        """Padding may read what a page's last owner left: it must be finite, for 0 * NaN is NaN."""
        if inputs.global_inputs is not None and inputs.global_inputs.fresh_pages_N is not None:
            cache.global_LPSHd.index_fill_(1, inputs.global_inputs.fresh_pages_N, 0)
        if inputs.chunked_inputs is not None and inputs.chunked_inputs.fresh_pages_N is not None:
            cache.chunked_LPSHd.index_fill_(1, inputs.chunked_inputs.fresh_pages_N, 0)

    def _add_attention(self, i: int, layer: LayerWeights, h_TD: Tensor, inputs: StepInputs, cache: KvCache) -> None:
        group = inputs.chunked_inputs if self._config.is_chunked(i) else inputs.global_inputs
        assert group is not None, "a layer belongs to a group that the batch has"
        x_TD = self._norm(h_TD, layer.input_norm_D)
        qkv_TQ = F.linear(x_TD, layer.wqkv_QD)
        uses_rope = i in self._config.rope_layers
        out_TA = self._attention(qkv_TQ, inputs, group, cache.layers[i], uses_rope)
        h_TD.add_(F.linear(out_TA, layer.wo_DA))

    def _add_moe(
        self, i: int, h_TD: Tensor, x_TD: Tensor, ffn: MoeGate, inputs: StepInputs, dispatch: Dispatch
    ) -> Tensor:
        choice = self._gate(x_TD, self._routers[i], inputs.positions_T)
        receipt = dispatch.dispatch(x_TD, choice.expert_ids_TK, choice.scores_TK, i)
        shared_TD = F.linear(swiglu(x_TD, ffn.shared.gate_up_ND), ffn.shared.down_DF)
        h_TD.add_(shared_TD.add_(dispatch.combine(receipt)))
        return choice.expert_ids_TK

    def _count(self, chosen: list[Tensor]) -> None:
        if chosen:
            ids_MN = torch.stack(chosen).flatten(1)
            self._expert_tokens_ME.scatter_add_(1, ids_MN, torch.ones_like(ids_MN))


def _add_ffn(h_TD: Tensor, x_TD: Tensor, ffn: DenseFfn) -> None:
    h_TD.add_(F.linear(swiglu(x_TD, ffn.gate_up_ND), ffn.down_DF))
