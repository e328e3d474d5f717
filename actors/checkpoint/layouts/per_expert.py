"""Unfused experts: three linears per expert, out-major, plain, FP8 or INT4 (see `rules.linear_rules`).

`experts.e.{gate,up}_proj` [F, D] and `down_proj` [D, F]. Sources: meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8
(compressed-tensors, float-quantized, strategy channel), RedHatAI/Llama-4-Scout-17B-16E-Instruct-quantized.w4a16
(pack-quantized, groups of 128).
"""

from collections.abc import Iterator, Mapping

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.headers import TensorInfo
from actors.checkpoint.layouts.rules import ExpertTarget, TensorRule, experts_prefix, linear_rules, swiglu_linears
from actors.checkpoint.pieces import Piece
from actors.checkpoint.quantization import ExpertFormat
from actors.checkpoint.shard import WHOLE, Shard


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
    tensors: Mapping[str, TensorInfo],
    form: ExpertFormat,
    layer: int,
    expert: int,
    target: ExpertTarget,
    shard: Shard = WHOLE,
) -> Iterator[Piece]:
    """One expert's linears as they are stored, gate and up into the halves of one tensor; of a slice its part alone."""
    for linear in swiglu_linears(f"{experts_prefix(layer)}{expert}.", target, shard):
        yield from linear.pieces(tensors, form)
