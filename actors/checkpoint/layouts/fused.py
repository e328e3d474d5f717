"""Fused experts: all experts of a layer in two tensors, input-major, plain or FP8.

`experts.gate_up_proj` [E, D, 2F] with the gate in the first F columns, `experts.down_proj` [E, F, D]; no `.weight`
suffix. FP8 adds `gate_up_proj_scale` [E, 1, 2F] and `down_proj_scale` [E, D, 1], one scale per output channel. Sources:
meta-llama/Llama-4-Scout-17B-16E and Maverick-17B-128E on the hub, transformers' Llama4TextExperts and its fbgemm form.
"""

from collections.abc import Iterator, Mapping

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.headers import TensorInfo
from actors.checkpoint.layouts.rules import PLAIN_DTYPES, ExpertTarget, TensorRule, experts_prefix
from actors.checkpoint.pieces import Piece
from actors.checkpoint.quantization import ExpertFormat


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


def expert_pieces(tensors: Mapping[str, TensorInfo], layer: int, expert: int, target: ExpertTarget) -> Iterator[Piece]:
    """One expert's slices of the tensors, weights turned to out-major by the views they are read into."""
    prefix = experts_prefix(layer)
    for name, final in (("gate_up_proj", target.gate_up_ND), ("down_proj", target.down_DF)):
        turned = final.t()
        yield Piece(info=tensors[prefix + name], first_row=expert * int(turned.shape[0]), target=turned)
    if target.gate_up_scale_N is not None and target.down_scale_D is not None:
        gate_up_1N, down_D1 = target.gate_up_scale_N.unsqueeze(0), target.down_scale_D.unsqueeze(-1)
        yield Piece(info=tensors[prefix + "gate_up_proj_scale"], first_row=expert, target=gate_up_1N)
        hidden = int(down_D1.shape[0])
        yield Piece(info=tensors[prefix + "down_proj_scale"], first_row=expert * hidden, target=down_D1)
