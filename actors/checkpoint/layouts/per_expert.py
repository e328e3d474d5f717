"""Unfused experts: three linears per expert, out-major, plain, FP8 or INT4 (see `rules.linear_rules`).

`experts.e.{gate,up}_proj` [F, D] and `down_proj` [D, F]. Sources: meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8
(compressed-tensors, float-quantized, strategy channel), RedHatAI/Llama-4-Scout-17B-16E-Instruct-quantized.w4a16
(pack-quantized, groups of 128).
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.headers import TensorInfo
from actors.checkpoint.layouts.rules import ExpertTarget, LinearTarget, TensorRule, experts_prefix, linear_rules
from actors.checkpoint.pieces import Piece
from actors.checkpoint.quantization import ExpertFormat

if TYPE_CHECKING:
    from torch import Tensor


def expected(config: ModelConfig, form: ExpertFormat) -> dict[str, TensorRule]:
    """The routed experts' tensors of every MoE layer."""
    hidden, width = config.hidden_size, config.expert_width
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    rules: dict[str, TensorRule] = {}
    for layer in config.moe_layers:
        for expert in range(config.num_experts):
            for name, shape in shapes.items():
                rules |= linear_rules(f"{experts_prefix(layer)}{expert}.{name}", shape, form)
    return rules


def expert_pieces(
    tensors: Mapping[str, TensorInfo], form: ExpertFormat, layer: int, expert: int, target: ExpertTarget
) -> Iterator[Piece]:
    """One expert's linears as they are stored, gate and up into the halves of one tensor."""
    prefix = f"{experts_prefix(layer)}{expert}."
    scales = _parts(target.gate_up_scale_N, target.down_scale_D)
    for (name, weight), (_, scale) in zip(_parts(target.gate_up_ND, target.down_DF), scales, strict=True):
        assert weight is not None, "every target has weights"
        columns = range(weight.shape[1])  # an expert is read whole, so only where they begin matters
        yield from LinearTarget(
            name=prefix + name, rows=range(weight.shape[0]), columns=columns, weight=weight, scale=scale
        ).pieces(tensors, form)


def _parts(gate_up: "Tensor | None", down: "Tensor | None") -> tuple[tuple[str, "Tensor | None"], ...]:
    if gate_up is None:
        return ("gate_proj", None), ("up_proj", None), ("down_proj", down)
    width = gate_up.shape[0] // 2
    return ("gate_proj", gate_up[:width]), ("up_proj", gate_up[width:]), ("down_proj", down)
