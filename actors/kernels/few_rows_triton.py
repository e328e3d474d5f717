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

from actors.kernels.grouped_triton import (
    FP8,
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
from actors.kernels.quantize_triton import TRITON_DTYPES, quantized, scale_for

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


@triton.jit
def scales_of_rows(peaks_ptr, rows_t, end, num_rows, num_peaks, PEAKS: tl.constexpr):
    """Scales of rows whose largest numbers lie in parts [num_peaks, num_rows]."""
    part = tl.arange(0, PEAKS)
    mask = (part < num_peaks)[:, None] & (rows_t < end)[None, :]
    peaks = tl.load(peaks_ptr + part[:, None] * num_rows + rows_t[None, :], mask=mask, other=0.0)
    return scale_for(tl.max(peaks, 0))


@triton.jit(do_not_specialize=["num_rows", "tiles_o"])
def few_rows_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, counts_ptr, peaks_ptr, y_ptr,
    num_rows, num_slots, outputs, inputs, stored_inputs, tiles_o, num_peaks,
    FORM: tl.constexpr, SWIGLU: tl.constexpr, SINGLE: tl.constexpr, WORD_ORDER: tl.constexpr, IN_ASM: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr,
    SLOTS: tl.constexpr, EVEN_I: tl.constexpr, ROUND: tl.constexpr, PEAKS: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_O outputs of BLOCK_T rows of one slot over 1/SPLIT of the inputs; in a step each warp
    takes BLOCK_I of them.

    INT4: BLOCK_I is a group. With PEAKS (FP8 only) SwiGLU also writes each tile's largest numbers, [tiles_o, N], and
    the matmul after it quantizes rows by them, PEAKS at most, instead of by `x_scale`. Else as `grouped_kernel`.
    """
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
    QUANTIZES: tl.constexpr = PEAKS > 0 and not SWIGLU
    rows_t = begin + tl.arange(0, BLOCK_T)
    if QUANTIZES:
        x_scale = scales_of_rows(peaks_ptr, rows_t, end, num_rows, num_peaks, PEAKS)
    elif FORM == FP8:
        x_scale = tl.load(x_scale_ptr + rows_t, mask=rows_t < end, other=0.0)
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
            if QUANTIZES:
                x = quantized(x.to(tl.float32), x_scale[None, None, :])
            acc = tl.dot(w, x, acc, input_precision="ieee")
    acc = tl.sum(acc, 0)
    if FORM == FP8:
        w_scale = tl.load(w_scale_ptr + slot * outputs + rows_o)
        acc = acc * w_scale[:, None] * x_scale[None, :]
    tokens = rows_t.to(tl.int64)
    if SWIGLU:
        acc = gated(acc, ROUND, BLOCK_O, BLOCK_T)
        if PEAKS > 0:
            peak = tl.max(tl.abs(acc.to(tl.float32)), 0)
            tl.store(peaks_ptr + tile_o.to(tl.int64) * num_rows + tokens, peak, mask=tokens < end)
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
    x_NI: Tensor, x_scale_N1: Tensor | None, weight_SOW: Tensor, scale: Tensor | None, counts_S: Tensor | None,
    y_PNO: Tensor, form: int, tiles: FewRowsTiles,
    *, swiglu: bool = False, word_order: bool = False, peaks_PN: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the rows that `counts_S` counts (all if it is None: one slot) of `y_PNO` [split, N, O].

    INT4: `tiles.inputs` is 128, and the inputs are a multiple of that for every warp. With SwiGLU there is one part.
    FP8: `peaks_PN`, fp32 with a row for each tile of outputs, is written with SwiGLU; without, x is not quantized yet,
    and they say by what it is.
    """
    num_rows, inputs = x_NI.shape
    num_slots, outputs, stored_inputs = weight_SOW.shape
    tiles_o = triton.cdiv(outputs, tiles.outputs)
    tiles_t = count_row_tiles(num_rows, num_slots, tiles.rows, counts_S)
    num_peaks = 0 if peaks_PN is None else peaks_PN.shape[0]
    few_rows_kernel[(tiles_o * tiles_t, tiles.split)](
        x_NI, x_scale_N1, weight_SOW, scale, counts_S, peaks_PN, y_PNO,
        num_rows, num_slots, outputs, inputs, stored_inputs, tiles_o, num_peaks,
        FORM=form, SWIGLU=swiglu, SINGLE=counts_S is None, WORD_ORDER=word_order,
        IN_ASM=x_NI.is_cuda and x_NI.dtype == torch.bfloat16,
        BLOCK_O=tiles.outputs, BLOCK_T=tiles.rows, BLOCK_I=tiles.inputs, WARPS=tiles.warps, SPLIT=tiles.split,
        SLOTS=triton.next_power_of_2(num_slots), EVEN_I=inputs % (tiles.inputs * tiles.warps) == 0,
        ROUND=TRITON_DTYPES.get(y_PNO.dtype if swiglu else torch.float32),
        PEAKS=triton.next_power_of_2(num_peaks) if num_peaks else 0,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
