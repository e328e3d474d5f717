"""Triton kernels of `quantize.py` and their launches: row by row, and none of those beyond the placed ones.

Owns how a row is laid over threads. Knows nothing of experts or slots.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.early_triton import await_inputs, early

FP8_MAX = tl.constexpr(448.0)
MAX_FEW = 128  # rows, about one for each multiprocessor
PLAIN, FP8, WORD_ORDER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how a row is written


@triton.jit
def word_order(position):
    """The column that lies at `position` in word order: 128 columns by (nibble pair, word, half). See quantize.py."""
    within = position % 128
    return position - within + (within % 32) // 2 * 8 + within // 32 + (within % 2) * 4


@triton.jit
def scale_for(largest):
    """Of numbers up to `largest`, so that they fill FP8's range."""
    return tl.where(largest > 0, tl.div_rn(largest, FP8_MAX), 1.0)


@triton.jit
def quantized(values, scale):
    """fp32 `values` / `scale` in FP8; `scale` has one number, or the shape of `values` with ones in it.

    Divides in three operations: a quotient that is a bit off, what it leaves, and that much more. Where the inverse of
    a scale is beyond fp32 the result is zero.
    """
    inverse = tl.where(scale > 1e-30, tl.div_rn(scale * 0 + 1.0, scale), 0.0)
    about = values * inverse
    quotient = tl.fma(tl.fma(-about, tl.zeros_like(values) + scale, values), tl.zeros_like(values) + inverse, about)
    return tl.clamp(quotient, -FP8_MAX, FP8_MAX).to(tl.float8e4nv)


@triton.jit
def write_row(values, columns, mask, y_ptr, scale_ptr, row, width, MODE: tl.constexpr):
    """Writes a row of fp32 `values`, quantized or as it is."""
    if MODE == FP8:
        scale = scale_for(tl.max(tl.abs(values), 0))
        tl.store(y_ptr + row * width + columns, quantized(values, scale), mask=mask)
        tl.store(scale_ptr + row, scale)
    else:
        tl.store(y_ptr + row * width + columns, values.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rows_kernel(x_ptr, y_ptr, scale_ptr, width, MODE: tl.constexpr, BLOCK: tl.constexpr):
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    source = word_order(columns) if MODE == WORD_ORDER else columns
    values = tl.load(x_ptr + row * width + source, mask=mask, other=0.0).to(tl.float32)
    write_row(values, columns, mask, y_ptr, scale_ptr, row, width, MODE)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(
    x_ptr, y_ptr, scale_ptr, ends_ptr, num_slots, num_rows, width,
    SPLIT: tl.constexpr, LIMITED: tl.constexpr, FEW: tl.constexpr, ROUND: tl.constexpr, MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of a row [2 * width] that may come in SPLIT fp32 parts, rounded where a model in ROUND does.

    FEW: reads the row before it knows whether it is one of those that are placed.
    """
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    if LIMITED:
        end = tl.load(ends_ptr + num_slots - 1)
        if not FEW:  # noqa: SIM102 (what is known to the compiler, and what is not)
            if row >= end:
                return
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    source = word_order(columns) if MODE == WORD_ORDER else columns
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        at = x_ptr + (part * num_rows.to(tl.int64) + row) * 2 * width + source
        gate += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up += tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    gate = gate.to(ROUND).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(ROUND).to(tl.float32)
    values = (silu * up.to(ROUND).to(tl.float32)).to(ROUND).to(tl.float32)
    if LIMITED and FEW:  # noqa: SIM102
        if row >= end:
            return
    write_row(values, columns, mask, y_ptr, scale_ptr, row, width, MODE)


TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float16: tl.float16}


def row_warps(block: int, num_rows: int) -> int:
    """Few rows leave most multiprocessors idle: each takes as many threads as there are."""
    return min(32, max(1, block // 256)) if num_rows <= MAX_FEW else min(16, max(1, block // 512))


def launch_rows(x_ND: Tensor, y_ND: Tensor, scale_N1: Tensor | None, mode: int) -> None:
    num_rows, width = x_ND.shape
    block = triton.next_power_of_2(width)
    warps = row_warps(block, num_rows)
    rows_kernel[(num_rows,)](x_ND, y_ND, scale_N1, width, mode, block, num_warps=warps, **early())


def launch_swiglu(
    x_PNF: Tensor, y_NF: Tensor, scale_N1: Tensor | None, ends_S: Tensor | None, round_to: torch.dtype, mode: int
) -> None:
    """`x_PNF` [parts, N, 2F]; rows from `ends_S[-1]` on are left alone."""
    num_parts, num_rows, _ = x_PNF.shape
    width = y_NF.shape[1]
    block = triton.next_power_of_2(width)
    num_slots = 0 if ends_S is None else ends_S.shape[0]
    swiglu_kernel[(num_rows,)](
        x_PNF, y_NF, scale_N1, ends_S, num_slots, num_rows, width,
        SPLIT=num_parts, LIMITED=ends_S is not None, FEW=num_rows <= MAX_FEW, ROUND=TRITON_DTYPES[round_to], MODE=mode,
        BLOCK=block, num_warps=row_warps(block, num_rows), **early(),
    )  # fmt: skip
