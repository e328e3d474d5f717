"""Adds what a layer computed to the residual stream and norms the sum, in one pass over memory.

Owns the order of the additions and their rounding. Knows nothing of which parts of a layer the additions come from.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from actors.attention.norm import RowNorm
from actors.kernels.triton_here import HAS_TRITON, tl, triton

MAX_WIDTH = 16384
_WIDE_ROW = 2048  # elements from which a row is worth more than four warps


def add_rms_norm(h_TD: Tensor, deltas: Sequence[Tensor | None], weight_D: Tensor, eps: float) -> Tensor:
    """h += delta in place, or h += a + b where there are two; returns rms_norm(h) * weight, [T, D] in h's dtype.

    All tensors have h's dtype and contiguous rows. The sum a + b is rounded to that dtype before it is added to h, as
    a layer adds its shared and its routed experts. None stands for a delta that is not there; the values of two deltas
    are undefined afterwards. Raises ValueError for more than two deltas or rows wider than MAX_WIDTH.
    """
    present = [delta for delta in deltas if delta is not None]
    if len(present) > 2 or h_TD.shape[1] > MAX_WIDTH:
        raise ValueError(f"{len(present)} additions to rows of {h_TD.shape[1]}: at most 2 and {MAX_WIDTH}")
    if h_TD.is_cuda and HAS_TRITON:
        return _with_triton(h_TD, present, weight_D, eps)
    return _with_torch(h_TD, present, weight_D, eps)


def _with_torch(h_TD: Tensor, deltas: Sequence[Tensor], weight_D: Tensor, eps: float) -> Tensor:
    if deltas:
        h_TD.add_(deltas[0] if len(deltas) == 1 else deltas[0].add_(deltas[1]))
    return _row_norm(h_TD.shape[1], eps, h_TD.dtype, h_TD.device)(h_TD, weight_D)


@lru_cache(maxsize=16)
def _row_norm(width: int, eps: float, dtype: torch.dtype, device: torch.device) -> RowNorm:
    return RowNorm(width, eps, dtype, device)


if HAS_TRITON:
    from actors.kernels.early_triton import await_inputs, early

    @triton.jit  # type: ignore[untyped-decorator]
    def _add_rms_norm_kernel(  # type: ignore[no-untyped-def]
        h, a, b, weight, x, h_stride, a_stride, b_stride, x_stride, width, eps,
        NUM_DELTAS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per row."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        dtype = h.dtype.element_ty
        weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        await_inputs()
        values = tl.load(h + row * h_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if NUM_DELTAS > 0:
            added = tl.load(a + row * a_stride + columns, mask=inside, other=0.0).to(tl.float32)
            if NUM_DELTAS > 1:
                added += tl.load(b + row * b_stride + columns, mask=inside, other=0.0).to(tl.float32)
                added = added.to(dtype).to(tl.float32)
            total = (values + added).to(dtype)
            tl.store(h + row * h_stride + columns, total, mask=inside)
            values = total.to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
        normed = (values * scale).to(dtype).to(tl.float32)
        tl.store(x + row * x_stride + columns, (normed * weights).to(dtype), mask=inside)


def _with_triton(h_TD: Tensor, deltas: Sequence[Tensor], weight_D: Tensor, eps: float) -> Tensor:
    num_rows, width = h_TD.shape
    x_TD = torch.empty((num_rows, width), dtype=h_TD.dtype, device=h_TD.device)
    if not num_rows:
        return x_TD
    a_TD = deltas[0] if deltas else h_TD  # a pointer that is not used, where there are fewer
    b_TD = deltas[1] if len(deltas) > 1 else h_TD
    block = triton.next_power_of_2(width)
    _add_rms_norm_kernel[(num_rows,)](
        h_TD, a_TD, b_TD, weight_D, x_TD, h_TD.stride(0), a_TD.stride(0), b_TD.stride(0), x_TD.stride(0), width, eps,
        NUM_DELTAS=len(deltas), BLOCK=block, num_warps=8 if block >= _WIDE_ROW else 4, **early(),
    )  # fmt: skip
    return x_TD
