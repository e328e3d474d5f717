"""The final tensors that ranks compute with, and how they come to be: read from a checkpoint or made at random.

Owns which stored tensors make which final one, so that a rank reads only what it holds. Knows nothing of how they are
multiplied. Shapes: V vocabulary, D hidden, F width of an FFN, N = 2F, S slots, E experts, A = heads * head_dim,
Q = (heads + 2 * kv heads) * head_dim. All weights are out-major: y = x @ weight.T.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.index import CheckpointIndex
from actors.checkpoint.layouts import fused, per_expert
from actors.checkpoint.layouts.rules import ExpertTarget
from actors.checkpoint.pieces import whole
from actors.checkpoint.random_weights import quantize_fp8, random_down, random_gate_up, random_lm_head, random_tensor
from actors.checkpoint.reader import Progress, Reader

Slots = Mapping[int, tuple[int, ...]]  # layer -> expert of each slot, as RankSpec.slots


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFfn:
    """SwiGLU: down(silu(gate(x)) * up(x)). The gate is the first half of `gate_up_ND` [2F, D]; `down_DF` [D, F]."""

    gate_up_ND: Tensor
    down_DF: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeGate:
    """What an attention rank holds of a MoE layer: the router [E, D] and the shared expert."""

    router_ED: Tensor
    shared: DenseFfn


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer, without its routed experts. `wqkv_QD` is queries, keys, values, in that order; `wo_DA` [D, A]."""

    input_norm_D: Tensor
    post_norm_D: Tensor
    wqkv_QD: Tensor
    wo_DA: Tensor
    ffn: DenseFfn | MoeGate


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """Everything but the routed experts. With tied embeddings `lm_head_VD` is `embed_VD`."""

    embed_VD: Tensor
    final_norm_D: Tensor
    lm_head_VD: Tensor
    layers: tuple[LayerWeights, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The slots of one MoE layer: `gate_up_SND` [S, 2F, D], gate half first, and `down_SDF` [S, D, F].

    With scales (fp32, per output channel) the weights are float8_e4m3fn and W[o, i] = weight[o, i] * scale[o].
    """

    gate_up_SND: Tensor
    down_SDF: Tensor
    gate_up_scale_SN: Tensor | None = None
    down_scale_SD: Tensor | None = None

    def slot(self, slot: int) -> ExpertTarget:
        """Views of one slot."""
        return ExpertTarget(
            gate_up_ND=self.gate_up_SND[slot],
            down_DF=self.down_SDF[slot],
            gate_up_scale_N=None if self.gate_up_scale_SN is None else self.gate_up_scale_SN[slot],
            down_scale_D=None if self.down_scale_SD is None else self.down_scale_SD[slot],
        )


def load_attention(
    index: CheckpointIndex,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Progress | None = None,
) -> AttentionWeights:
    """Reads everything but the routed experts, converted to `dtype`. Raises CheckpointError."""
    weights = _empty_attention(config, dtype, torch.device(device))
    pieces = [whole(index.tensor(name), target) for name, target in _parts(weights, config)]
    Reader().read(pieces, progress)
    return weights


def load_experts(
    index: CheckpointIndex,
    config: ModelConfig,
    slots: Slots,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Progress | None = None,
) -> dict[int, ExpertWeights]:
    """Reads the experts of `slots` and nothing else; by layer. FP8 stays FP8 with its scales, whatever `dtype` is.

    Raises CheckpointError, and ValueError for a slot that the model does not have.
    """
    weights = _empty_experts(config, slots, dtype, torch.device(device), fp8=index.layout == "per_expert_fp8")
    read_experts(index, _targets(weights, slots), progress)
    return weights


def read_experts(
    index: CheckpointIndex, wanted: Iterable[tuple[int, int, ExpertTarget]], progress: Progress | None = None
) -> None:
    """Reads experts, each a (layer, expert, where to), and nothing else. Raises CheckpointError.

    On CUDA the reads are queued on the calling thread's current stream, and may not have ended when it returns.
    """
    pieces_of = fused.expert_pieces if index.layout == "fused" else per_expert.expert_pieces
    pieces = [piece for layer, expert, target in wanted for piece in pieces_of(index.tensors, layer, expert, target)]
    Reader().read(pieces, progress)


def dummy_attention(config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seed: int) -> AttentionWeights:
    """Random weights made on the device, no file read; the same for the same seed and kind of device."""
    weights = _empty_attention(config, dtype, torch.device(device))
    for name, target in _parts(weights, config):
        if name == "lm_head.weight":
            target.copy_(random_lm_head(config, seed=seed, device=target.device))
        else:
            target.copy_(random_tensor(name, tuple(target.shape), seed=seed, device=target.device))
    return weights


def dummy_experts(
    config: ModelConfig, slots: Slots, dtype: torch.dtype, device: torch.device | str, seed: int, fp8: bool
) -> dict[int, ExpertWeights]:
    """Random experts made on the device. Each depends on (seed, layer, expert) only: any split is the same model."""
    weights = _empty_experts(config, slots, dtype, torch.device(device), fp8)
    for layer, expert, target in _targets(weights, slots):
        make_expert(config, layer, expert, target, seed)
    return weights


def make_expert(config: ModelConfig, layer: int, expert: int, target: ExpertTarget, seed: int) -> None:
    """Fills `target`, on its device, with the random expert of (seed, layer, expert)."""
    device = target.down_DF.device
    gate_up_ND = random_gate_up(config, layer, expert, seed=seed, device=device)
    _fill(target.gate_up_ND, target.gate_up_scale_N, gate_up_ND)
    _fill(target.down_DF, target.down_scale_D, random_down(config, layer, expert, seed=seed, device=device))


def num_weight_bytes(weights: AttentionWeights | Mapping[int, ExpertWeights]) -> int:
    """Bytes that the tensors occupy."""
    if isinstance(weights, AttentionWeights):
        tensors = [weights.embed_VD, weights.final_norm_D]
        if weights.lm_head_VD is not weights.embed_VD:
            tensors.append(weights.lm_head_VD)
        for layer in weights.layers:
            ffn = layer.ffn if isinstance(layer.ffn, DenseFfn) else layer.ffn.shared
            tensors += [layer.input_norm_D, layer.post_norm_D, layer.wqkv_QD, layer.wo_DA, ffn.gate_up_ND, ffn.down_DF]
            if isinstance(layer.ffn, MoeGate):
                tensors.append(layer.ffn.router_ED)
    else:
        tensors = [
            tensor
            for experts in weights.values()
            for tensor in (experts.gate_up_SND, experts.down_SDF, experts.gate_up_scale_SN, experts.down_scale_SD)
            if tensor is not None
        ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _fill(weight_OI: Tensor, scale_O: Tensor | None, values_OI: Tensor) -> None:
    if scale_O is None:
        weight_OI.copy_(values_OI)
        return
    quantized_OI, scales_O = quantize_fp8(values_OI)
    weight_OI.copy_(quantized_OI)
    scale_O.copy_(scales_O)


def _empty_attention(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> AttentionWeights:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden = config.hidden_size
    embed_VD = empty(config.vocab_size, hidden)
    return AttentionWeights(
        embed_VD=embed_VD,
        final_norm_D=empty(hidden),
        lm_head_VD=embed_VD if config.tie_word_embeddings else empty(config.vocab_size, hidden),
        layers=tuple(
            LayerWeights(
                input_norm_D=empty(hidden),
                post_norm_D=empty(hidden),
                wqkv_QD=empty((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, hidden),
                wo_DA=empty(hidden, config.num_heads * config.head_dim),
                ffn=_empty_ffn(config, layer, dtype, device),
            )
            for layer in range(config.num_layers)
        ),
    )


def _empty_ffn(config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device) -> DenseFfn | MoeGate:
    hidden, is_moe = config.hidden_size, config.is_moe(layer)
    width = config.expert_width if is_moe else config.dense_width
    ffn = DenseFfn(
        gate_up_ND=torch.empty(2 * width, hidden, dtype=dtype, device=device),
        down_DF=torch.empty(hidden, width, dtype=dtype, device=device),
    )
    if not is_moe:
        return ffn
    return MoeGate(router_ED=torch.empty(config.num_experts, hidden, dtype=dtype, device=device), shared=ffn)


def _empty_experts(
    config: ModelConfig, slots: Slots, dtype: torch.dtype, device: torch.device, fp8: bool
) -> dict[int, ExpertWeights]:
    for layer, experts in slots.items():
        if not config.is_moe(layer) or any(not 0 <= expert < config.num_experts for expert in experts):
            raise ValueError(f"layer {layer} has no experts {experts}")
    stored = torch.float8_e4m3fn if fp8 else dtype
    return {layer: allocate_slots(config, len(experts), stored, device, fp8) for layer, experts in slots.items()}


def allocate_slots(
    config: ModelConfig, num_slots: int, dtype: torch.dtype, device: torch.device, scales: bool
) -> ExpertWeights:
    """Room for `num_slots` experts of one layer, contents undefined; with room for scales if they have any."""
    hidden, width = config.hidden_size, config.expert_width
    return ExpertWeights(
        gate_up_SND=torch.empty(num_slots, 2 * width, hidden, dtype=dtype, device=device),
        down_SDF=torch.empty(num_slots, hidden, width, dtype=dtype, device=device),
        gate_up_scale_SN=torch.empty(num_slots, 2 * width, device=device) if scales else None,
        down_scale_SD=torch.empty(num_slots, hidden, device=device) if scales else None,
    )


def _targets(weights: Mapping[int, ExpertWeights], slots: Slots) -> Iterator[tuple[int, int, ExpertTarget]]:
    for layer, experts in slots.items():
        for slot, expert in enumerate(experts):
            yield layer, expert, weights[layer].slot(slot)


def _parts(weights: AttentionWeights, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of an attention rank by its text-only name, and the view of a final tensor that it fills."""
    yield "model.embed_tokens.weight", weights.embed_VD
    yield "model.norm.weight", weights.final_norm_D
    if not config.tie_word_embeddings:
        yield "lm_head.weight", weights.lm_head_VD
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for idx, layer in enumerate(weights.layers):
        parts = {
            "input_layernorm": layer.input_norm_D,
            "post_attention_layernorm": layer.post_norm_D,
            "self_attn.q_proj": layer.wqkv_QD[:queries],
            "self_attn.k_proj": layer.wqkv_QD[queries : queries + keys],
            "self_attn.v_proj": layer.wqkv_QD[queries + keys :],
            "self_attn.o_proj": layer.wo_DA,
        }
        if isinstance(layer.ffn, MoeGate):
            parts["feed_forward.router"] = layer.ffn.router_ED
            parts |= _ffn_parts("feed_forward.shared_expert.", layer.ffn.shared)
        else:
            parts |= _ffn_parts("feed_forward.", layer.ffn)
        for name, target in parts.items():
            yield f"model.layers.{idx}.{name}.weight", target


def _ffn_parts(prefix: str, ffn: DenseFfn) -> dict[str, Tensor]:
    width = ffn.down_DF.shape[1]
    return {
        prefix + "gate_proj": ffn.gate_up_ND[:width],
        prefix + "up_proj": ffn.gate_up_ND[width:],
        prefix + "down_proj": ffn.down_DF,
    }
