"""Fused experts: all experts of a layer in two tensors, input-major, plain or FP8.

`experts.gate_up_proj` [E, D, 2F] with the gate in the first F columns, `experts.down_proj` [E, F, D]; no `.weight`
suffix. FP8 adds `gate_up_proj_scale` [E, 1, 2F] and `down_proj_scale` [E, D, 1], one scale per output channel. Sources:
meta-llama/Llama-4-Scout-17B-16E and Maverick-17B-128E on the hub, transformers' Llama4TextExperts and its fbgemm form.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.headers import TensorInfo
from actors.checkpoint.layouts.rules import PLAIN_DTYPES, ExpertTarget, TensorRule, experts_prefix
from actors.checkpoint.pieces import Piece
from actors.checkpoint.quantization import ExpertFormat
from actors.checkpoint.shard import WHOLE, Shard

if TYPE_CHECKING:
    from torch import Tensor


def expected(config: ModelConfig, form: ExpertFormat) -> dict[str, TensorRule]:
    """The routed experts' tensors of every MoE layer."""
    experts, hidden, width = config.num_experts, config.hidden_size, config.expert_width
    dtypes = ("F8_E4M3",) if form == "fp8" else PLAIN_DTYPES
    rules = {}
    for layer in config.moe_layers:
        prefix = experts_prefix(layer)
        rules[prefix + "gate_up_proj"] = TensorRule(shape=(experts, hidden, 2 * width), dtypes=dtypes)
        rules[prefix + "down_proj"] = TensorRule(shape=(experts, width, hidden), dtypes=dtypes)
        if form == "fp8":
            rules[prefix + "gate_up_proj_scale"] = TensorRule(shape=(experts, 1, 2 * width))
            rules[prefix + "down_proj_scale"] = TensorRule(shape=(experts, hidden, 1))
    return rules


def expert_pieces(
    tensors: Mapping[str, TensorInfo], layer: int, expert: int, target: ExpertTarget, shard: Shard = WHOLE
) -> Iterator[Piece]:
    """One expert's slices of the tensors, weights turned to out-major by the views they are read into."""
    prefix, hidden = experts_prefix(layer), int(target.down_DF.shape[0])
    width = int(target.down_DF.shape[1]) * shard.of
    info = tensors[prefix + "gate_up_proj"]
    for first, weight in _columns_of(target.gate_up_ND, width, shard):
        yield Piece(info=info, first_row=expert * hidden, first_column=first, target=weight.t())
    info, first_row = tensors[prefix + "down_proj"], expert * width + shard.part(width).start
    yield Piece(info=info, first_row=first_row, target=target.down_DF.t())
    if target.gate_up_scale_N is not None and target.down_scale_D is not None:
        info = tensors[prefix + "gate_up_proj_scale"]
        for first, scale in _columns_of(target.gate_up_scale_N, width, shard):
            yield Piece(info=info, first_row=expert, first_column=first, target=scale.unsqueeze(0))
        info, down_D1 = tensors[prefix + "down_proj_scale"], target.down_scale_D.unsqueeze(-1)
        yield Piece(info=info, first_row=expert * hidden, target=down_D1)


def _columns_of(gate_up: "Tensor", width: int, shard: Shard) -> tuple[tuple[int, "Tensor"], ...]:
    """(first stored column, where to) of what is read of gate and up: all at once, or a slice of each."""
    if shard.of == 1:
        return ((0, gate_up),)
    gate, up = gate_up.chunk(2)
    first = shard.part(width).start
    return (first, gate), (width + first, up)
