"""What a stored tensor must look like, and the final tensors that one expert is read into."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PLAIN_DTYPES = ("BF16", "F32", "F16")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """Shape and allowed dtypes (as safetensors spells them) of one stored tensor."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = PLAIN_DTYPES
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTarget:
    """Views of one slot's final tensors, out-major. Scales only where weights are fp8.

    gate_up_ND: [2F, D], gate half first. down_DF: [D, F]. gate_up_scale_N: [2F], down_scale_D: [D], fp32.
    """

    gate_up_ND: "Tensor"
    down_DF: "Tensor"
    gate_up_scale_N: "Tensor | None" = None
    down_scale_D: "Tensor | None" = None


def experts_prefix(layer: int) -> str:
    return f"model.layers.{layer}.feed_forward.experts."
