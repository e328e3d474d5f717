"""The two quantized forms of a linear's weight: how to make them, and how to get numbers back.

Owns the arithmetic and the packing. Knows nothing of files, models or kernels. Weights are out-major: [O, I] with O
outputs. G = I / 128 groups, C = I / 8 packed columns.
"""

import torch
from torch import Tensor

from actors.checkpoint.config import INT4_GROUP

FP8_MAX = float(torch.finfo(torch.float8_e4m3fn).max)  # 448
PACKED = 8  # nibbles of one int32
_INT4_OFFSET = 8  # nibbles are stored as q + 8, q in [-8, 7]


def quantize_fp8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 E4M3 with one bf16-representable scale per output channel: weight ~ q * scale.

    Returns q_OI float8_e4m3fn and scale_O fp32. Source: compressed-tensors, strategy channel, symmetric, minmax.
    """
    largest_O = weight_OI.abs().amax(dim=1).clamp_(min=1e-12)
    scale_O = (largest_O / FP8_MAX).to(torch.bfloat16).float()
    scaled_OI = (weight_OI / scale_O[:, None]).clamp_(-FP8_MAX, FP8_MAX)
    return scaled_OI.to(torch.float8_e4m3fn), scale_O


def quantize_int4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """INT4 with one bf16 scale per output channel and group of 128 columns: weight ~ (nibble - 8) * scale.

    Returns packed_OC int32 and scale_OG bf16. Source: compressed-tensors, pack-quantized, group 128, symmetric, minmax.
    """
    grouped_OGI = weight_OI.reshape(len(weight_OI), -1, INT4_GROUP)
    largest_OG = grouped_OGI.abs().amax(dim=2).clamp_(min=1e-12)
    scale_OG = (largest_OG / 7.5).to(torch.bfloat16)
    q_OGI = (grouped_OGI / scale_OG.float()[..., None]).round_().clamp_(-_INT4_OFFSET, _INT4_OFFSET - 1)
    return _pack(q_OGI.flatten(1).to(torch.int32)), scale_OG


def widen_int4(packed_OC: Tensor, scale_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """[O, I] in `dtype`: the exact product of the whole number and its scale, rounded once."""
    shifts_8 = torch.arange(0, 4 * PACKED, 4, dtype=torch.int32, device=packed_OC.device)
    q_OI = (packed_OC[..., None] >> shifts_8).bitwise_and_(15).sub_(_INT4_OFFSET).flatten(1)
    exact_OGI = q_OI.view(*scale_OG.shape, INT4_GROUP).float() * scale_OG.float()[..., None]
    return exact_OGI.flatten(1).to(dtype)


def _pack(q_OI: Tensor) -> Tensor:
    """Column 8j + n into bits 4n..4n+3 of packed column j."""
    shifts_8 = torch.arange(0, 4 * PACKED, 4, dtype=torch.int32, device=q_OI.device)
    nibbles_OC8 = (q_OI + _INT4_OFFSET).view(len(q_OI), -1, PACKED) << shifts_8
    return nibbles_OC8.sum(dim=2, dtype=torch.int32)  # no two share a bit


def put_quantized(values_OI: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """Writes fp32 values into a final weight, in the form that its dtype and scale say: INT4, FP8 or plain."""
    if scale is None:
        weight.copy_(values_OI)
        return
    quantized, scales = quantize_int4(values_OI) if weight.dtype == torch.int32 else quantize_fp8(values_OI)
    weight.copy_(quantized)
    scale.copy_(scales)
