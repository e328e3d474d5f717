"""The final tensors that ranks compute with.

Owns their shapes and the room for them. Knows nothing of how they are filled (`weights.py`) or multiplied. Shapes: V
vocabulary, D hidden, F width of an FFN, N = 2F, S slots, E experts, A = heads * head_dim, Q = (heads + 2 * kv heads) *
head_dim. All weights are out-major: y = x @ weight.T. A tensor-parallel shard has fewer heads, a smaller F and V.

The dtype of a linear's weight says which form it has. Plain: [O, I], no scale. FP8: float8_e4m3fn [O, I] and an fp32
scale [O]; on a CPU, which cannot multiply it, widened to the compute dtype (exactly) with the same scale. INT4: int32
[O, I/8] and a bf16 scale [O, I/128]; on a CPU it is held plain, scaled and rounded once to the compute dtype.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.layouts.rules import ExpertTarget
from actors.checkpoint.quantization import INT4_GROUP, ExpertFormat
from actors.checkpoint.quantized import PACKED
from actors.checkpoint.shard import WHOLE, Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFfn:
    """SwiGLU: down(silu(gate(x)) * up(x)). The gate is the first half of `gate_up_ND` [2F, D]; `down_DF` [D, F].

    Quantized ones have scales; in INT4, columns of both are packed by eight.
    """

    gate_up_ND: Tensor
    down_DF: Tensor
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None


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
    """Everything but the routed experts. With tied embeddings `lm_head_VD` is rows of `embed_VD`, not a copy.

    Of a shard: its heads' rows of `wqkv_QD` and columns of `wo_DA`, its columns of each FFN (rows of gate and of up),
    and its rows of the head; the embedding, norms and routers are whole. What `wo_DA` and `down_DF` give are terms of
    sums over the shards.
    """

    embed_VD: Tensor
    final_norm_D: Tensor
    lm_head_VD: Tensor
    layers: tuple[LayerWeights, ...]
    shard: Shard = WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The slots of one MoE layer: `gate_up_SND` [S, 2F, D], gate half first, and `down_SDF` [S, D, F].

    FP8 has scales [S, 2F] and [S, D]. INT4 weights are [S, 2F, D/8] and [S, D, F/8], scales [S, 2F, D/128] and
    [S, D, F/128].
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How weights are held on a device. `form` is that of the linears that may be quantized.

    `widens`: as a CPU holds them (see above), else as they are stored.
    """

    form: ExpertFormat
    dtype: torch.dtype
    device: torch.device
    widens: bool

    @staticmethod
    def on(device: torch.device, form: ExpertFormat, dtype: torch.dtype) -> "Room":
        """What ranks on `device` compute with."""
        return Room(form=form, dtype=dtype, device=device, widens=device.type == "cpu")

    @property
    def is_packed(self) -> bool:
        return self.form == "int4" and not self.widens

    def linear(self, *shape: int) -> tuple[Tensor, Tensor | None]:
        """Weights [..., O, I] and their scales, contents undefined."""
        *outer, columns = shape
        if self.is_packed:
            scale = torch.empty(*outer, columns // INT4_GROUP, dtype=torch.bfloat16, device=self.device)
            return torch.empty(*outer, columns // PACKED, dtype=torch.int32, device=self.device), scale
        if self.form == "fp8":
            held = self.dtype if self.widens else torch.float8_e4m3fn
            scale = torch.empty(outer, dtype=torch.float32, device=self.device)
            return torch.empty(shape, dtype=held, device=self.device), scale
        return torch.empty(shape, dtype=self.dtype, device=self.device), None


def allocate_slots(hidden: int, width: int, num_slots: int, room: Room) -> ExpertWeights:
    """Room for `num_slots` experts of one layer: D is `hidden`, F is `width`."""
    gate_up_SND, gate_up_scale_SN = room.linear(num_slots, 2 * width, hidden)
    down_SDF, down_scale_SD = room.linear(num_slots, hidden, width)
    return ExpertWeights(
        gate_up_SND=gate_up_SND, down_SDF=down_SDF, gate_up_scale_SN=gate_up_scale_SN, down_scale_SD=down_scale_SD
    )


def allocate_attention(config: ModelConfig, room: Room, shard: Shard) -> AttentionWeights:
    """Room for one shard of everything but the routed experts."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=room.dtype, device=room.device)

    hidden, vocab_rows = config.hidden_size, shard.part(config.vocab_size)
    heads, kv_heads = config.num_heads // shard.of, config.num_kv_heads // shard.of
    embed_VD = empty(config.vocab_size, hidden)
    tied_VD = embed_VD if shard.of == 1 else embed_VD[vocab_rows.start : vocab_rows.stop]
    return AttentionWeights(
        embed_VD=embed_VD,
        final_norm_D=empty(hidden),
        lm_head_VD=tied_VD if config.tie_word_embeddings else empty(len(vocab_rows), hidden),
        layers=tuple(
            LayerWeights(
                input_norm_D=empty(hidden),
                post_norm_D=empty(hidden),
                wqkv_QD=empty((heads + 2 * kv_heads) * config.head_dim, hidden),
                wo_DA=empty(hidden, heads * config.head_dim),
                ffn=_allocate_ffn(config, layer, room, shard),
            )
            for layer in range(config.num_layers)
        ),
        shard=shard,
    )


def _allocate_ffn(config: ModelConfig, layer: int, room: Room, shard: Shard) -> DenseFfn | MoeGate:
    hidden, is_moe = config.hidden_size, config.is_moe(layer)
    width = (config.expert_width if is_moe else config.dense_width) // shard.of
    gate_up_ND, gate_up_scale = room.linear(2 * width, hidden)
    down_DF, down_scale = room.linear(hidden, width)
    ffn = DenseFfn(gate_up_ND=gate_up_ND, down_DF=down_DF, gate_up_scale=gate_up_scale, down_scale=down_scale)
    if not is_moe:
        return ffn
    router_ED = torch.empty(config.num_experts, hidden, dtype=room.dtype, device=room.device)
    return MoeGate(router_ED=router_ED, shared=ffn)


def num_weight_bytes(weights: AttentionWeights | Mapping[int, ExpertWeights]) -> int:
    """Bytes that the tensors occupy; memory that two of them share counts once."""
    values = (weights,) if isinstance(weights, AttentionWeights) else weights.values()
    memory = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for value in values
        for tensor in _tensors_of(value)
    }
    return sum(memory.values())


def _tensors_of(value: object) -> Iterator[Tensor]:
    """Every tensor inside of nested dataclasses and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors_of(item)
    elif isinstance(value, AttentionWeights | LayerWeights | MoeGate | DenseFfn | ExpertWeights):
        for field in fields(value):
            yield from _tensors_of(getattr(value, field.name))
