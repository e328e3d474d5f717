"""What Triton kernels of the attention side do to heads: rotation and norm, and the form that the cache keeps.

Owns the arithmetic. Knows nothing of where heads come from or go to. Needs Triton: imported only where it is installed.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

import triton
import triton.language as tl

FP8_LIMIT = tl.constexpr(448.0)  # largest finite float8_e4m3fn


@triton.jit
def turned(x_Hd, rotation, eps, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NORMS: tl.constexpr):
    """Heads [HEADS, HEAD_DIM] of a token, rotated by its cosines and sines, and normed, in their dtype."""
    pair = tl.arange(0, HEAD_DIM // 2)
    cos_R = tl.load(rotation + 2 * pair)[None, :]
    sin_R = tl.load(rotation + 2 * pair + 1)[None, :]
    even_HR, odd_HR = tl.split(tl.reshape(x_Hd.to(tl.float32), (HEADS, HEAD_DIM // 2, 2)))
    turned_HR2 = tl.join(even_HR * cos_R - odd_HR * sin_R, even_HR * sin_R + odd_HR * cos_R)
    y_Hd = tl.reshape(turned_HR2, (HEADS, HEAD_DIM)).to(x_Hd.dtype)
    if NORMS:
        exact_Hd = y_Hd.to(tl.float32)
        squares_H = tl.sum(exact_Hd * exact_Hd, axis=1) / HEAD_DIM
        y_Hd = (exact_Hd * tl.rsqrt(squares_H + eps)[:, None]).to(x_Hd.dtype)
    return y_Hd


@triton.jit
def as_kept(x, cache):
    """fp32 in the cache's dtype; float8 saturates."""
    if cache.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(x, FP8_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        x = tl.maximum(x, -FP8_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x.to(cache.dtype.element_ty)
