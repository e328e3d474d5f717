"""Triton's matmul of few rows: the warps of a program divide the inputs among themselves, and add up at the end.

So tiles of outputs are small enough for narrow weights to fill the device in one launch, every warp's work is its own,
and a row's sums are cut alike whatever other rows there are. Forms, slots and counts are as in `grouped_triton.py`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.early_triton import await_inputs, early
from actors.kernels.grouped_triton import (
    GROUP,
    GROUP_WORDS,
    INT4,
    RAISED,
    count_row_tiles,
    find_rows,
    gated,
    unpack_words,
    weight_rows,
    write_features,
)
from actors.kernels.quantize_triton import TRITON_DTYPES

LEAST_O = tl.constexpr(16)  # outputs of one product of tensor cores


@triton.jit
def raised_groups(words, DTYPE: tl.constexpr, IN_ASM: tl.constexpr, WARPS: tl.constexpr, BLOCK_O: tl.constexpr):
    """[WARPS, BLOCK_O, 128] from [WARPS, BLOCK_O, 16] words: weights plus RAISED, columns in word order."""
    a0, b0, a1, b1, a2, b2, a3, b3 = unpack_words(words, DTYPE, IN_ASM, True)
    even = tl.join(tl.join(a0, b0), tl.join(a2, b2))  # [warp, o, word, half, pair / 2]
    odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    return tl.join(even, odd).permute(0, 1, 4, 5, 2, 3).reshape(WARPS, BLOCK_O, 128)


@triton.jit
def raise_of_rows(x, WARPS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr):
    """What the products of raised weights are too large by, negative, for each of BLOCK_O outputs alike."""
    half = tl.full((WARPS, LEAST_O, 64), -RAISED, x.dtype)
    # Joined from halves, as the weights are: so the compiler wants x in one and the same layout for both products.
    base = tl.dot(tl.join(half, half).reshape(WARPS, LEAST_O, 128), x, input_precision="ieee")
    if BLOCK_O > LEAST_O:
        base = tl.broadcast_to(base.reshape(WARPS, 1, LEAST_O, BLOCK_T), (WARPS, BLOCK_O // LEAST_O, LEAST_O, BLOCK_T))
        base = base.reshape(WARPS, BLOCK_O, BLOCK_T)
    return base


@triton.jit(do_not_specialize=["num_rows", "tiles_o"])
def few_rows_kernel(
    x_ptr, w_ptr, w_scale_ptr, counts_ptr, y_ptr,
    num_rows, num_slots, outputs, inputs, stored_inputs, tiles_o,
    FORM: tl.constexpr, SWIGLU: tl.constexpr, SINGLE: tl.constexpr, WORD_ORDER: tl.constexpr, IN_ASM: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr,
    SLOTS: tl.constexpr, EVEN_I: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_O outputs of BLOCK_T rows of one slot over 1/SPLIT of the inputs; in a step each warp
    takes BLOCK_I of them.

    Weights are plain or INT4, of which BLOCK_I is a group. Else as `grouped_kernel`.
    """
    await_inputs()
    pid = tl.program_id(0)
    tile_o = pid % tiles_o
    tile_t = pid // tiles_o
    if SINGLE:
        slot = 0
        begin = tile_t * BLOCK_T
        end = num_rows
    else:
        slot, begin, end = find_rows(counts_ptr, tile_t, num_slots, BLOCK_T, SLOTS)
        if slot >= SLOTS:
            return
    slot = tl.cast(slot, tl.int64)
    rows_o = weight_rows(tile_o, outputs, SWIGLU, BLOCK_O)
    rows_t = begin + tl.arange(0, BLOCK_T)
    here = (rows_t < end)[None, None, :]
    w_rows = w_ptr + slot * outputs * stored_inputs + rows_o[None, :, None] * stored_inputs
    x_rows = x_ptr + rows_t[None, None, :].to(tl.int64) * inputs
    warp = tl.arange(0, WARPS)
    i = warp[:, None] * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    acc = tl.zeros((WARPS, BLOCK_O, BLOCK_T), tl.float32)
    steps = tl.cdiv(inputs, WARPS * BLOCK_I)
    per_split = tl.cdiv(steps, SPLIT)
    split = tl.program_id(1)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    if FORM == INT4:
        word = warp[:, None] * GROUP_WORDS + tl.arange(0, GROUP_WORDS)[None, :]
        scales = w_scale_ptr + (slot * outputs + rows_o)[None, :] * (inputs // GROUP) + warp[:, None]
        scale = tl.load(scales + tl.minimum(first, steps - 1) * WARPS)
        for step in range(first, last):
            ahead = tl.load(scales + tl.minimum(step + 1, steps - 1) * WARPS)
            words = tl.load(w_rows + word[:, None, :] + step * (WARPS * GROUP_WORDS))
            x = tl.load(x_rows + i[:, :, None] + step * (WARPS * BLOCK_I), mask=here, other=0.0)
            w = raised_groups(words, x_ptr.dtype.element_ty, IN_ASM, WARPS, BLOCK_O)
            base = raise_of_rows(x, WARPS, BLOCK_O, BLOCK_T)
            acc += tl.dot(w, x, base, input_precision="ieee") * scale.to(tl.float32)[:, :, None]
            scale = ahead
    else:
        for step in range(first, last):
            at = i + step * (WARPS * BLOCK_I)
            if EVEN_I:
                w = tl.load(w_rows + at[:, None, :])
                x = tl.load(x_rows + at[:, :, None], mask=here, other=0.0)
            else:
                w = tl.load(w_rows + at[:, None, :], mask=(at < inputs)[:, None, :], other=0.0)
                x = tl.load(x_rows + at[:, :, None], mask=(at < inputs)[:, :, None] & here, other=0.0)
            acc = tl.dot(w, x, acc, input_precision="ieee")
    acc = tl.sum(acc, 0)
    tokens = rows_t.to(tl.int64)
    if SWIGLU:
        acc = gated(acc, ROUND, BLOCK_O, BLOCK_T)
    num_features = outputs // 2 if SWIGLU else outputs
    FEATURES: tl.constexpr = BLOCK_O // 2 if SWIGLU else BLOCK_O
    y_part = y_ptr + split * num_rows.to(tl.int64) * outputs
    write_features(acc, y_part, tile_o, tokens, end, num_features, WORD_ORDER, FEATURES)


@dataclass(frozen=True, slots=True, kw_only=True)
class FewRowsTiles:
    """How a matmul of few rows is cut: outputs and rows of a program, inputs of each of its warps in a step.

    `split`: parts over the inputs, of which each is written on its own.
    """

    outputs: int
    rows: int
    inputs: int
    warps: int
    stages: int
    split: int = 1


def launch_few_rows(
    x_NI: Tensor, weight_SOW: Tensor, scale: Tensor | None, counts_S: Tensor | None, y_PNO: Tensor, form: int,
    tiles: FewRowsTiles, *, swiglu: bool = False, word_order: bool = False,
) -> None:  # fmt: skip
    """Writes the rows that `counts_S` counts (all if it is None: one slot) of `y_PNO` [split, N, O].

    INT4: `tiles.inputs` is 128, and the inputs are a multiple of that for every warp. With SwiGLU there is one part.
    """
    num_rows, inputs = x_NI.shape
    num_slots, outputs, stored_inputs = weight_SOW.shape
    tiles_o = triton.cdiv(outputs, tiles.outputs)
    tiles_t = count_row_tiles(num_rows, num_slots, tiles.rows, counts_S)
    few_rows_kernel[(tiles_o * tiles_t, tiles.split)](
        x_NI, weight_SOW, scale, counts_S, y_PNO,
        num_rows, num_slots, outputs, inputs, stored_inputs, tiles_o,
        FORM=form, SWIGLU=swiglu, SINGLE=counts_S is None, WORD_ORDER=word_order,
        IN_ASM=x_NI.is_cuda and x_NI.dtype == torch.bfloat16,
        BLOCK_O=tiles.outputs, BLOCK_T=tiles.rows, BLOCK_I=tiles.inputs, WARPS=tiles.warps, SPLIT=tiles.split,
        SLOTS=triton.next_power_of_2(num_slots), EVEN_I=inputs % (tiles.inputs * tiles.warps) == 0,
        ROUND=TRITON_DTYPES.get(y_PNO.dtype if swiglu else torch.float32),
        num_warps=tiles.warps, num_stages=tiles.stages, **early(),
    )  # fmt: skip
