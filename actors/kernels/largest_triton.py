"""The Triton form of `largest.py`: one program per row.

Owns how numbers are ordered as integers. Needs Triton: imported only where it is installed.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.early_triton import await_inputs, early

WARPS = 16
MAX_BLOCK = 8192  # numbers that a program reads at once


@triton.jit
def order_of(values):
    """int32 that rank as fp32 `values` do, NaN above all."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0.0 equal 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(values == values, order, 0x7FFFFFFF)


@triton.jit
def value_of(order):
    """The fp32 that has this order."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def as_key(order, columns):
    """int64 that rank by order, then by column, the first above the others."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def largest_of_row(x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The key of the largest of WIDTH numbers from `x` on. Loads do not wait for each other: the loop is unrolled."""
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -0x80000000, tl.int32)
    columns = lanes
    for step in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        at = step * BLOCK + lanes
        values = tl.load(x + at, mask=at < WIDTH, other=-float("inf")).to(tl.float32)
        order = tl.where(at < WIDTH, order_of(values), -0x80000000)
        columns = tl.where(order > best, at, columns)
        best = tl.maximum(order, best)
    return tl.max(as_key(best, columns), axis=0)


@triton.jit
def largest_kernel(x, values, columns, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    key = largest_of_row(x + row * x_stride, WIDTH, BLOCK)
    tl.store(values + row, value_of((key >> 32).to(tl.int32)))
    tl.store(columns + row, 0x7FFFFFFF - (key & 0x7FFFFFFF))


def launch_largest(x_BV: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, width = x_BV.shape
    values_B = torch.empty(num_rows, dtype=torch.float32, device=x_BV.device)
    columns_B = torch.empty(num_rows, dtype=torch.int64, device=x_BV.device)
    block, warps = block_of(width)
    largest_kernel[(num_rows,)](
        x_BV, values_B, columns_B, x_BV.stride(0), WIDTH=width, BLOCK=block, num_warps=warps, **early()
    )
    return values_B, columns_B


def block_of(width: int) -> tuple[int, int]:
    """Numbers that a program reads at once, and its warps."""
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return block, min(WARPS, max(1, block // 256))
