"""Dense matmuls with weights in any of the forms that checkpoints store: plain, FP8, INT4.

Owns the dense cases of `grouped.py` (one slot that takes every row). Knows nothing of layers.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.kernels.grouped import form_of, grouped_linear, grouped_swiglu
from actors.kernels.quantize import dequantize_int4, quantize_rows, swiglu
from actors.kernels.route import combine_rows, form_rows


def linear(x_TI: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x @ W.T, [T, O] in x's dtype.

    `weight`, `scale`: plain [O, I]; FP8 [O, I] with fp32 [O], x quantized per row; INT4 int32 [O, I/8] with bf16
    [O, I/128]. On a CPU FP8 may be held in x's dtype, exactly, with its scale. T may be 0.
    """
    if scale is None and (not x_TI.is_cuda or x_TI.dtype != torch.bfloat16):
        return F.linear(x_TI, weight)
    if not x_TI.is_cuda:
        return _on_cpu(x_TI, weight, scale)
    if x_TI.shape[0] == 0:
        return x_TI.new_empty(0, weight.shape[0])
    rows = form_rows(x_TI.contiguous(), form_of(weight))
    parts_PTO = grouped_linear(rows, weight[None], None if scale is None else scale[None])
    return combine_rows(parts_PTO, None, x_TI.shape[0], x_TI.dtype)


def swiglu_ffn(
    x_TD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    room_TD: Tensor | None = None,
) -> Tensor:
    """down(silu(gate(x)) * up(x)), [T, D], with weights [2F, D] and [D, F] in the forms of `linear`.

    The result may lie in `room_TD`, which may be x itself.
    """
    if not x_TD.is_cuda:
        return linear(swiglu(linear(x_TD, gate_up, gate_up_scale)), down, down_scale)
    if x_TD.shape[0] == 0:
        return x_TD.new_empty(0, down.shape[0])
    gate_up_scale = None if gate_up_scale is None else gate_up_scale[None]
    down_scale = None if down_scale is None else down_scale[None]
    hidden = grouped_swiglu(form_rows(x_TD.contiguous(), form_of(gate_up)), gate_up[None], gate_up_scale)
    if room_TD is not None and form_of(down) == "plain":
        return torch.mm(hidden.x_ND, down.t(), out=room_TD)
    return combine_rows(grouped_linear(hidden, down[None], down_scale), None, x_TD.shape[0], x_TD.dtype)


def _on_cpu(x_TI: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    assert scale is not None
    if form_of(weight) == "int4":
        return F.linear(x_TI, dequantize_int4(weight, scale, x_TI.dtype))
    quantized_TI, scales_T1 = quantize_rows(x_TI)
    product_TO = F.linear(quantized_TI.to(x_TI.dtype), weight.to(x_TI.dtype))
    return (product_TO.float() * scales_T1 * scale).to(x_TI.dtype)
