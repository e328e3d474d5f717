"""Unfused experts: three linears per expert, out-major, plain or FP8 with one scale per output channel.

`experts.e.{gate,up}_proj.weight` [F, D] and `down_proj.weight` [D, F]; FP8 adds `.weight_scale` [out, 1] and
W[o, i] = float(q[o, i]) * scale[o]. Source: meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8 (compressed-tensors,
float-quantized, strategy channel).
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.headers import TensorInfo
from actors.checkpoint.layouts.rules import PLAIN_DTYPES, ExpertTarget, TensorRule, experts_prefix
from actors.checkpoint.pieces import Piece, whole

if TYPE_CHECKING:
    from torch import Tensor


def expected(config: ModelConfig, *, fp8: bool) -> dict[str, TensorRule]:
    """The routed experts' tensors of every MoE layer."""
    hidden, width = config.hidden_size, config.expert_width
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    rules = {}
    for layer in config.moe_layers:
        for expert in range(config.num_experts):
            for name, shape in shapes.items():
                linear = f"{experts_prefix(layer)}{expert}.{name}"
                rules[linear + ".weight"] = TensorRule(shape=shape, dtypes=("F8_E4M3",) if fp8 else PLAIN_DTYPES)
                if fp8:
                    rules[linear + ".weight_scale"] = TensorRule(shape=(shape[0], 1))
    return rules


def expert_pieces(tensors: Mapping[str, TensorInfo], layer: int, expert: int, target: ExpertTarget) -> Iterator[Piece]:
    """One expert's linears, gate and up into the halves of one tensor; scales where the target has room for them."""
    linear = f"{experts_prefix(layer)}{expert}."
    for name, final in _parts(target.gate_up_ND, target.down_DF):
        yield whole(tensors[f"{linear}{name}.weight"], final)
    if target.gate_up_scale_N is not None and target.down_scale_D is not None:
        for name, final in _parts(target.gate_up_scale_N, target.down_scale_D):
            yield whole(tensors[f"{linear}{name}.weight_scale"], final.unsqueeze(-1))


def _parts(gate_up: "Tensor", down: "Tensor") -> tuple[tuple[str, "Tensor"], ...]:
    width = gate_up.shape[0] // 2
    return ("gate_proj", gate_up[:width]), ("up_proj", gate_up[width:]), ("down_proj", down)
