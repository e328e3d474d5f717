"""The largest number of each row and where it is: what a greedy choice needs of logits.

Owns the order: NaN is above all, of equals the first. Knows nothing of tokens.
"""

from torch import Tensor

from actors.kernels.triton_here import HAS_TRITON


def largest(x_BV: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [B], and int64 [B] its column. Rows are contiguous. -0.0 and 0.0 are equal."""
    if x_BV.is_cuda and HAS_TRITON and x_BV.numel():
        from actors.kernels.largest_triton import launch_largest

        return launch_largest(x_BV)
    values_B, columns_B = x_BV.max(-1)
    return values_B.float(), columns_B
