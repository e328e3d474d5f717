"""Numbers in few bits: rows quantized to FP8, packed INT4 weights, and SwiGLU with what follows it in one kernel.

Owns rounding. Knows nothing of experts. FP8 source: compressed-tensors, float-quantized with a dynamic scale per token.
INT4 source: compressed-tensors, pack-quantized, symmetric, groups of 128 inputs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.kernels.triton_here import HAS_TRITON

FP8_MAX = 448.0  # float8_e4m3fn
GROUP_INPUTS = 128  # of INT4: inputs that share a scale
WORD_INPUTS = 8  # of INT4: inputs in an int32
_PLAIN, _FP8, _WORD_ORDER = 0, 1, 2


def quantize_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [N, D] and fp32 scales [N, 1] with x ~ q * s, s = max|x| / 448 of each row; 0 rows stay 0."""
    if x_ND.is_cuda and HAS_TRITON:
        from actors.kernels.quantize_triton import launch_rows

        quantized_ND, scales_N1 = _empty_quantized(x_ND, x_ND.shape[1])
        if x_ND.shape[0]:
            launch_rows(x_ND.contiguous(), quantized_ND, scales_N1, _FP8)
        return quantized_ND, scales_N1
    exact_ND = x_ND.float()
    scales_N1 = exact_ND.abs().amax(dim=1, keepdim=True) / FP8_MAX
    safe_N1 = torch.where(scales_N1 > 0, scales_N1, torch.ones_like(scales_N1))
    return (exact_ND / safe_N1).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), safe_N1


def swiglu(gate_up_NF: Tensor) -> Tensor:
    """silu(gate) * up: [N, F] from [N, 2F], the gate first; silu is rounded to the dtype before the product."""
    if gate_up_NF.is_cuda and HAS_TRITON:
        return placed_swiglu(gate_up_NF[None], None, gate_up_NF.dtype)
    gate_NF, up_NF = gate_up_NF.chunk(2, dim=1)
    return F.silu(gate_NF).mul_(up_NF)


def placed_swiglu(
    gate_up_PNF: Tensor, ends_S: Tensor | None, dtype: torch.dtype, *, in_word_order: bool = False
) -> Tensor:
    """SwiGLU of the sum of P parts [P, N, 2F], in `dtype`; rows from `ends_S[-1]` on are not computed."""
    num_rows, width = gate_up_PNF.shape[1], gate_up_PNF.shape[2] // 2
    if gate_up_PNF.is_cuda and HAS_TRITON:
        from actors.kernels.quantize_triton import launch_swiglu

        y_NF = torch.empty(num_rows, width, dtype=dtype, device=gate_up_PNF.device)
        if num_rows:
            launch_swiglu(gate_up_PNF, y_NF, None, ends_S, dtype, _WORD_ORDER if in_word_order else _PLAIN)
        return y_NF
    gate_NF, up_NF = gate_up_PNF.sum(0).to(dtype).chunk(2, dim=1)
    y_NF = F.silu(gate_NF).mul_(up_NF)
    return to_word_order(y_NF) if in_word_order else y_NF


def placed_swiglu_quantized(gate_up_PNF: Tensor, ends_S: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`placed_swiglu`, then `quantize_rows`, in one kernel."""
    if gate_up_PNF.is_cuda and HAS_TRITON:
        from actors.kernels.quantize_triton import launch_swiglu

        quantized_NF, scales_N1 = _empty_quantized(gate_up_PNF[0], gate_up_PNF.shape[2] // 2)
        if gate_up_PNF.shape[1]:
            launch_swiglu(gate_up_PNF, quantized_NF, scales_N1, ends_S, dtype, _FP8)
        return quantized_NF, scales_N1
    return quantize_rows(placed_swiglu(gate_up_PNF, ends_S, dtype))


def _empty_quantized(x_ND: Tensor, width: int) -> tuple[Tensor, Tensor]:
    num_rows, device = x_ND.shape[0], x_ND.device
    return (
        torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(num_rows, 1, dtype=torch.float32, device=device),
    )


# --- INT4 ---------------------------------------------------------------------------------------------------------


def dequantize_int4(words_OW: Tensor, scale_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., O, I] from int32 [..., O, I/8] and scales [..., O, I/128]: (nibble - 8) * scale, rounded to `dtype`."""
    shifts_8 = torch.arange(0, 32, 4, dtype=torch.int32, device=words_OW.device)
    values_OI = ((words_OW[..., None] >> shifts_8) & 15).sub_(8).flatten(-2)
    groups_OGI: Tensor = values_OI.unflatten(-1, (-1, GROUP_INPUTS)).float() * scale_OG.float()[..., None]
    return groups_OGI.flatten(-2).to(dtype)


def quantize_int4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Packed int32 [..., O, I/8] and bf16 scales [..., O, I/128] of a weight; max|w| of a group becomes 7.5."""
    groups_OGI = weight_OI.float().unflatten(-1, (-1, GROUP_INPUTS))
    scale_OG = (groups_OGI.abs().amax(-1) / 7.5).clamp_(min=1e-10).to(torch.bfloat16)
    nibbles_OI = (groups_OGI / scale_OG.float()[..., None]).round_().clamp_(-8, 7).to(torch.int64).add_(8).flatten(-2)
    shifts_8 = torch.arange(0, 32, 4, device=weight_OI.device)
    words_OW = (nibbles_OI.unflatten(-1, (-1, WORD_INPUTS)) << shifts_8).sum(-1)
    return torch.where(words_OW >= 1 << 31, words_OW - (1 << 32), words_OW).to(torch.int32), scale_OG


def to_word_order(x_NI: Tensor) -> Tensor:
    """Columns of each group of 128 in the order in which a kernel takes nibbles out of words: n, n + 4 of every word.

    Position 32n + 2j + h has column 8j + n + 4h (n < 4, j < 16, h < 2): two nibbles 16 bits apart come out of a word
    with one mask, as the two halves of a register. A sum over columns does not mind.
    """
    if x_NI.is_cuda and HAS_TRITON:
        from actors.kernels.quantize_triton import launch_rows

        y_NI = torch.empty_like(x_NI, memory_format=torch.contiguous_format)
        if x_NI.shape[0]:
            launch_rows(x_NI.contiguous(), y_NI, None, _WORD_ORDER)
        return y_NI
    grouped: Tensor = x_NI.unflatten(-1, (-1, GROUP_INPUTS // WORD_INPUTS, 2, 4))  # group, word, half, pair
    return grouped.permute(0, 1, 4, 2, 3).reshape(x_NI.shape)
