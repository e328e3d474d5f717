"""Triton's product of one row and plain weights, without tensor cores: threads multiply what they load, in fp32.

Nothing passes through shared memory until the sums are done, so that all loads are on their way from the start: the
first weights even before the row is there. Owns that one case; more rows are for the other kernels.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.early_triton import await_inputs, early
from actors.kernels.grouped_triton import gated, weight_rows
from actors.kernels.quantize_triton import TRITON_DTYPES


@triton.jit
def one_row_kernel(
    x_ptr, w_ptr, y_ptr, outputs, inputs,
    SWIGLU: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, UNROLL: tl.constexpr, EVEN_I: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_O outputs; with SWIGLU half of them are gates, the others their ups."""
    tile_o = tl.program_id(0)
    rows_o = weight_rows(tile_o, outputs, SWIGLU, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    w_at = w_ptr + rows_o[:, None].to(tl.int64) * inputs + i[None, :]
    w = tl.load(w_at, mask=(i < inputs)[None, :], other=0.0)
    await_inputs()
    products = w.to(tl.float32) * tl.load(x_ptr + i, mask=i < inputs, other=0.0).to(tl.float32)[None, :]
    for at in tl.range(BLOCK_I, inputs, BLOCK_I, loop_unroll_factor=UNROLL):
        if EVEN_I:
            w = tl.load(w_at + at)
            x = tl.load(x_ptr + at + i)
        else:
            inside = at + i < inputs
            w = tl.load(w_at + at, mask=inside[None, :], other=0.0)
            x = tl.load(x_ptr + at + i, mask=inside, other=0.0)
        products += w.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(products, 1)
    FEATURES: tl.constexpr = BLOCK_O // 2 if SWIGLU else BLOCK_O
    num_features = outputs // 2 if SWIGLU else outputs
    if SWIGLU:
        y = gated(y.reshape(BLOCK_O, 1), ROUND, BLOCK_O, 1).reshape(FEATURES)
    features = tile_o * FEATURES + tl.arange(0, FEATURES)
    tl.store(y_ptr + features, y.to(y_ptr.dtype.element_ty), mask=features < num_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneRowTiles:
    """Outputs of a program, its inputs in a step, steps after the first whose loads are issued together, and warps."""

    outputs: int
    inputs: int
    unroll: int
    warps: int


def launch_one_row(x_1I: Tensor, weight_OI: Tensor, y_1O: Tensor, tiles: OneRowTiles, *, swiglu: bool = False) -> None:
    """y = x @ W.T, or SwiGLU of it, [1, O / 2]."""
    outputs, inputs = weight_OI.shape
    one_row_kernel[(triton.cdiv(outputs, tiles.outputs),)](
        x_1I, weight_OI, y_1O, outputs, inputs,
        SWIGLU=swiglu, BLOCK_O=tiles.outputs, BLOCK_I=tiles.inputs, UNROLL=tiles.unroll,
        EVEN_I=inputs % tiles.inputs == 0, ROUND=TRITON_DTYPES[y_1O.dtype if swiglu else torch.float32],
        num_warps=tiles.warps, num_stages=1, **early(),
    )  # fmt: skip
