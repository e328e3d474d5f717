"""Fused plain experts: all experts of a layer in two tensors, input-major.

`experts.gate_up_proj` [E, D, 2F] with the gate in the first F columns, `experts.down_proj` [E, F, D]; no `.weight`
suffix. Source: meta-llama/Llama-4-Scout-17B-16E and Maverick-17B-128E on the hub, transformers' Llama4TextExperts.
"""

from collections.abc import Iterator, Mapping

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.headers import TensorInfo
from actors.checkpoint.layouts.rules import ExpertTarget, TensorRule, experts_prefix
from actors.checkpoint.pieces import Piece


def expected(config: ModelConfig) -> dict[str, TensorRule]:
    """The routed experts' tensors of every MoE layer."""
    experts, hidden, width = config.num_experts, config.hidden_size, config.expert_width
    rules = {}
    for layer in config.moe_layers:
        rules[experts_prefix(layer) + "gate_up_proj"] = TensorRule(shape=(experts, hidden, 2 * width))
        rules[experts_prefix(layer) + "down_proj"] = TensorRule(shape=(experts, width, hidden))
    return rules


def expert_pieces(tensors: Mapping[str, TensorInfo], layer: int, expert: int, target: ExpertTarget) -> Iterator[Piece]:
    """One expert's slices of the two tensors, turned to out-major by the views they are read into."""
    for name, final in (("gate_up_proj", target.gate_up_ND), ("down_proj", target.down_DF)):
        turned = final.t()
        yield Piece(info=tensors[experts_prefix(layer) + name], first_row=expert * int(turned.shape[0]), target=turned)
