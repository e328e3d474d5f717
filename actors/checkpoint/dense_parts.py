"""Weights part by part: which rows and columns of which stored tensor are which final one.

Owns the names, the cuts of a shard, and the parts whose final form is not the stored one. Knows nothing of files, nor
how large a read should be.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.expected import ffn_form, ffn_shapes
from actors.checkpoint.headers import TensorInfo
from actors.checkpoint.layouts.rules import ExpertTarget, LinearTarget, experts_prefix, swiglu_linears
from actors.checkpoint.pieces import Piece
from actors.checkpoint.quantization import INT4_GROUP, ExpertFormat
from actors.checkpoint.quantized import PACKED, quantize_fp8, quantize_int4, widen_int4
from actors.checkpoint.random_weights import head_loudness, random_rows, random_tensor
from actors.checkpoint.reader import TORCH_DTYPES
from actors.checkpoint.shard import Shard
from actors.checkpoint.tensors import AttentionWeights, DenseFfn, LayerWeights, MoeGate

_HEAD = "lm_head"
_BLOCK_VALUES = 1 << 24  # what is quantized at a time, in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePart:
    """One stored tensor: `shape` is all of it, `target` what of it is held, and where.

    A vector is a matrix of one row. `stored` is its form in the checkpoint; the target's dtype and scale say how it is
    held.
    """

    shape: tuple[int, int]
    target: LinearTarget
    stored: ExpertFormat = "plain"
    is_vector: bool = False

    @property
    def is_converted(self) -> bool:
        """Whether it is read beside its final place: INT4 that is held plain, plain that becomes FP8."""
        if self.stored == "int4":
            return self.target.scale is None
        return self.stored == "plain" and self.target.scale is not None

    def staging(self, tensors: Mapping[str, TensorInfo], device: torch.device) -> LinearTarget:
        """Where to read it to on `device`: its final place, or memory of its own."""
        if not self.is_converted:
            return self.target
        name, rows, columns = self.target.name, self.target.rows, self.target.columns
        if self.stored == "int4":
            packed = torch.empty(len(rows), len(columns) // PACKED, dtype=torch.int32, device=device)
            scale = torch.empty(len(rows), len(columns) // INT4_GROUP, dtype=torch.bfloat16, device=device)
            return LinearTarget(name=name, rows=rows, columns=columns, weight=packed, scale=scale)
        columns = range(self.shape[1])  # a channel's scale is that of its whole row
        dtype = TORCH_DTYPES[tensors[f"{name}.weight"].dtype]
        return LinearTarget(
            name=name,
            rows=rows,
            columns=columns,
            weight=torch.empty(len(rows), len(columns), dtype=dtype, device=device),
        )

    def pieces(self, tensors: Mapping[str, TensorInfo], into: LinearTarget) -> list[Piece]:
        """What is to be read into the final place or into `staging`."""
        return list(into.pieces(tensors, self.stored))

    def convert(self, staged: LinearTarget) -> None:
        """Brings what was read into `staging` to its final place and form."""
        if self.stored == "int4":
            assert staged.scale is not None, "INT4 has scales"
            self.target.weight.copy_(widen_int4(staged.weight, staged.scale, self.target.weight.dtype))
            return
        step = max(1, _BLOCK_VALUES // self.shape[1])
        for begin in range(0, len(self.target.rows), step):
            self._put(staged.weight[begin : begin + step].float(), begin)

    def make(self, config: ModelConfig, seed: int) -> None:
        """Fills it with the random weight that a made checkpoint of `seed` has there."""
        name, rows, device = f"{self.target.name}.weight", self.target.rows, self.target.weight.device
        if self.is_vector:
            self.target.weight[0] = random_tensor(name, self.shape[1:], seed=seed, device=device)
            return
        loudness_V1 = head_loudness(config, device) if self.target.name == _HEAD else None
        for block, values in random_rows(name, self.shape, rows, seed=seed, device=device):
            if loudness_V1 is not None:
                values *= loudness_V1[block.start : block.stop]
            if self.stored == "plain" and self.is_converted:
                values = values.to(getattr(torch, config.dtype)).float()  # as it would have been stored
            self._put(values, block.start - rows.start)

    def _put(self, values_RI: Tensor, begin: int) -> None:
        """Whole rows of fp32 values become rows from `begin` on of the final tensors, cut to their columns."""
        target, columns = self.target, slice(self.target.columns.start, self.target.columns.stop)
        weight = target.weight[begin : begin + len(values_RI)]
        scale = None if target.scale is None else target.scale[begin : begin + len(values_RI)]
        if self.stored == "int4":
            packed, scales = quantize_int4(values_RI)
            if scale is None:
                weight.copy_(widen_int4(packed, scales, weight.dtype)[:, columns])
            else:
                weight.copy_(packed[:, columns.start // PACKED : columns.stop // PACKED])
                scale.copy_(scales[:, columns.start // INT4_GROUP : columns.stop // INT4_GROUP])
        elif scale is not None:
            quantized, scales = quantize_fp8(values_RI)
            weight.copy_(quantized[:, columns])
            scale.copy_(scales)
        else:
            weight.copy_(values_RI[:, columns])


def dense_parts(weights: AttentionWeights, config: ModelConfig) -> Iterator[DensePart]:
    """Every stored tensor of an attention rank, by its text-only name."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield _plain("model.embed_tokens", (vocab, hidden), weights.embed_VD)
    yield _vector("model.norm", weights.final_norm_D)
    if not config.tie_word_embeddings:
        yield _plain(_HEAD, (vocab, hidden), weights.lm_head_VD, rows=weights.shard.part(vocab))
    for idx, layer in enumerate(weights.layers):
        yield from _attention_parts(f"model.layers.{idx}.", layer, config, weights.shard)
        ffn = layer.ffn
        if isinstance(ffn, MoeGate):
            yield _plain(f"model.layers.{idx}.feed_forward.router", (config.num_experts, hidden), ffn.router_ED)
            ffn = ffn.shared
        yield from _ffn_parts(ffn, config, idx, weights.shard)


def _attention_parts(prefix: str, layer: LayerWeights, config: ModelConfig, shard: Shard) -> Iterator[DensePart]:
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    query_rows, key_rows = shard.part(queries), shard.part(keys)  # whole heads, for those are what is divided
    wq, wk, wv = layer.wqkv_QD.split([len(query_rows), len(key_rows), len(key_rows)])
    yield _vector(prefix + "input_layernorm", layer.input_norm_D)
    yield _vector(prefix + "post_attention_layernorm", layer.post_norm_D)
    yield _plain(prefix + "self_attn.q_proj", (queries, hidden), wq, rows=query_rows)
    yield _plain(prefix + "self_attn.k_proj", (keys, hidden), wk, rows=key_rows)
    yield _plain(prefix + "self_attn.v_proj", (keys, hidden), wv, rows=key_rows)
    yield _plain(prefix + "self_attn.o_proj", (hidden, queries), layer.wo_DA, columns=query_rows)


def _ffn_parts(ffn: DenseFfn, config: ModelConfig, layer: int, shard: Shard) -> Iterator[DensePart]:
    shapes = ffn_shapes(config, layer)
    prefix = next(iter(shapes)).removesuffix("gate_proj")
    held = ExpertTarget(
        gate_up_ND=ffn.gate_up_ND, down_DF=ffn.down_DF, gate_up_scale_N=ffn.gate_up_scale, down_scale_D=ffn.down_scale
    )
    for linear in swiglu_linears(prefix, held, shard):
        yield DensePart(shape=shapes[linear.name], target=linear, stored=ffn_form(config))


def expert_parts(
    config: ModelConfig, layer: int, expert: int, target: ExpertTarget, shard: Shard
) -> Iterator[DensePart]:
    """The linears of one routed expert, in the form that `target` has, of which it holds `shard`."""
    hidden, width = config.hidden_size, config.expert_width
    is_packed = target.down_DF.dtype == torch.int32
    stored: ExpertFormat = "int4" if is_packed else "plain" if target.down_scale_D is None else "fp8"
    gate, up, down = swiglu_linears(f"{experts_prefix(layer)}{expert}.", target, shard)
    for linear, shape in ((gate, (width, hidden)), (up, (width, hidden)), (down, (hidden, width))):
        yield DensePart(shape=shape, target=linear, stored=stored)


def _plain(
    name: str, shape: tuple[int, int], weight: Tensor, rows: range | None = None, columns: range | None = None
) -> DensePart:
    target = LinearTarget(
        name=name,
        rows=range(shape[0]) if rows is None else rows,
        columns=range(shape[1]) if columns is None else columns,
        weight=weight,
    )
    return DensePart(shape=shape, target=target)


def _vector(name: str, weight_D: Tensor) -> DensePart:
    shape = (1, weight_D.shape[0])
    target = LinearTarget(name=name, rows=range(1), columns=range(shape[1]), weight=weight_D.unsqueeze(0))
    return DensePart(shape=shape, target=target, is_vector=True)
