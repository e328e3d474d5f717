"""Triton's grouped matmul: y[rows of a slot] = x[those rows] @ W[slot].T, with counts that only the device knows.

Weights are the tall operand (at few rows a step does little else than read them), plain, FP8, or INT4 that is unpacked
in registers. Owns tiles and accumulation; knows nothing of experts.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.early_triton import await_inputs, early
from actors.kernels.quantize_triton import TRITON_DTYPES

PLAIN, FP8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
GROUP_WORDS = tl.constexpr(16)  # int32 words of a group of 128 inputs
GROUP = tl.constexpr(128)


def _unpacking(subtraction: str) -> str:
    """PTX: four pairs of bf16 out of a word; a nibble or-ed into the significand of 128.0 is 128 + nibble, exactly.

    Two of them lie 16 bits apart, so that one mask and one or (one instruction together) make a pair.
    """
    pairs = "".join(
        f"""
            shr.u32 rest, $8, {4 * n};
            lop3.b32 pair, rest, 0x000F000F, 0x43004300, 0xEA;
            {subtraction}
            mov.b32 {{${2 * n}, ${2 * n + 1}}}, pair;
        """
        for n in range(4)
    )
    return f"{{ .reg .b32 pair, rest, base; mov.b32 base, 0x43084308; {pairs} }}"


UNPACK = tl.constexpr(_unpacking("sub.rn.bf16x2 pair, pair, base;"))
UNPACK_RAISED = tl.constexpr(_unpacking(""))
RAISED = tl.constexpr(136.0)  # what is too much in values that were unpacked without the subtraction


@triton.jit
def unpack_words(words, DTYPE: tl.constexpr, IN_ASM: tl.constexpr, IS_RAISED: tl.constexpr):
    """Eight tensors from int32 words: nibbles 0, 4, 1, 5, 2, 6, 3, 7, less 8; plus RAISED if so asked.

    In assembly they are bf16.
    """
    if IN_ASM:
        return tl.inline_asm_elementwise(
            UNPACK_RAISED if IS_RAISED else UNPACK,
            "=h,=h,=h,=h,=h,=h,=h,=h,r",
            [words],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    less: tl.constexpr = 8 - 136 if IS_RAISED else 8
    return (
        ((words & 15) - less).to(DTYPE),
        (((words >> 16) & 15) - less).to(DTYPE),
        (((words >> 4) & 15) - less).to(DTYPE),
        (((words >> 20) & 15) - less).to(DTYPE),
        (((words >> 8) & 15) - less).to(DTYPE),
        (((words >> 24) & 15) - less).to(DTYPE),
        (((words >> 12) & 15) - less).to(DTYPE),
        (((words >> 28) & 15) - less).to(DTYPE),
    )


@triton.jit
def group_in_word_order(words, DTYPE: tl.constexpr, IN_ASM: tl.constexpr, BLOCK_O: tl.constexpr):
    """[BLOCK_O, 128] from [BLOCK_O, 16] words, columns in word order: no value leaves its thread."""
    a0, b0, a1, b1, a2, b2, a3, b3 = unpack_words(words, DTYPE, IN_ASM, False)
    pairs_even = tl.join(tl.join(a0, b0), tl.join(a2, b2))  # [o, word, half, pair / 2]
    pairs_odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    return tl.join(pairs_even, pairs_odd).permute(0, 3, 4, 1, 2).reshape(BLOCK_O, 128)


@triton.jit
def find_rows(counts_ptr, tile, num_slots, BLOCK_T: tl.constexpr, SLOTS: tl.constexpr):
    """The slot (SLOTS if there is none), first row and end row of a tile of rows."""
    slots = tl.arange(0, SLOTS)
    counts = tl.load(counts_ptr + slots, mask=slots < num_slots, other=0).to(tl.int32)
    tiles = (counts + BLOCK_T - 1) // BLOCK_T
    slot = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    first_row = tl.sum(tl.where(slots < slot, counts, 0), 0)
    first_tile = tl.sum(tl.where(slots < slot, tiles, 0), 0)
    count = tl.sum(tl.where(slots == slot, counts, 0), 0)
    return slot, first_row + (tile - first_tile) * BLOCK_T, first_row + count


@triton.jit
def weight_rows(tile_o, outputs, SWIGLU: tl.constexpr, BLOCK_O: tl.constexpr):
    """The rows of a weight that a tile of outputs reads; with SWIGLU first the gates, then their ups."""
    if SWIGLU:
        num_features = outputs // 2
        i = tl.arange(0, BLOCK_O)
        feature = tl.minimum(tile_o * (BLOCK_O // 2) + i % (BLOCK_O // 2), num_features - 1)
        return tl.where(i < BLOCK_O // 2, feature, feature + num_features)
    return tl.minimum(tile_o * BLOCK_O + tl.arange(0, BLOCK_O), outputs - 1)


@triton.jit
def gated(acc, ROUND: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr):
    """silu(gate) * up, [BLOCK_O / 2, BLOCK_T], of a tile of `weight_rows`; rounded where a model in ROUND does."""
    gate, up = tl.split(acc.reshape(2, BLOCK_O // 2, BLOCK_T).permute(1, 2, 0))
    gate = gate.to(ROUND).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(ROUND).to(tl.float32)
    return (silu * up.to(ROUND).to(tl.float32)).to(ROUND)


@triton.jit
def write_features(
    acc, y_ptr, tile_o, tokens, end, num_features, WORD_ORDER: tl.constexpr, FEATURES: tl.constexpr
):  # fmt: skip
    """Writes a tile [FEATURES, BLOCK_T] to those rows of y in `tokens` that are before `end`."""
    features = tile_o * FEATURES + tl.arange(0, FEATURES)
    at = features
    if WORD_ORDER:
        within = features % 128
        at = features - within + (within % 4) * 32 + within // 8 * 2 + within % 8 // 4
    mask = (features < num_features)[:, None] & (tokens < end)[None, :]
    tl.store(y_ptr + tokens[None, :] * num_features + at[:, None], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "tiles_t", "group_o"])
def grouped_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, counts_ptr, y_ptr,
    num_rows, num_slots, outputs, inputs, stored_inputs, tiles_t, group_o,
    FORM: tl.constexpr, SWIGLU: tl.constexpr, SINGLE: tl.constexpr, WORD_ORDER: tl.constexpr, IN_ASM: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, SPLIT: tl.constexpr,
    SLOTS: tl.constexpr, EVEN_I: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_O outputs of BLOCK_T rows of one slot over 1/SPLIT of the inputs.

    With SWIGLU half of BLOCK_O are gates, the others their ups, and silu(gate) * up is written (in word order if so
    asked). Programs run through `group_o` tiles of outputs before the next tile of rows. SINGLE: one slot, all rows.
    """
    await_inputs()
    pid = tl.program_id(0)
    split = tl.program_id(1)
    FEATURES: tl.constexpr = BLOCK_O // 2 if SWIGLU else BLOCK_O
    num_features = outputs // 2 if SWIGLU else outputs
    tiles_o = tl.cdiv(num_features, FEATURES)
    group = pid // (group_o * tiles_t)
    group_size = tl.minimum(tiles_o - group * group_o, group_o)
    within = pid - group * group_o * tiles_t
    tile_o = group * group_o + within % group_size
    tile_t = within // group_size
    if SINGLE:
        slot = 0
        begin = tile_t * BLOCK_T
        end = num_rows
    else:
        slot, begin, end = find_rows(counts_ptr, tile_t, num_slots, BLOCK_T, SLOTS)
        if slot >= SLOTS:
            return

    rows_o = weight_rows(tile_o, outputs, SWIGLU, BLOCK_O)
    rows_t = begin + tl.arange(0, BLOCK_T)
    here = rows_t < end
    w_slot = w_ptr + tl.cast(slot, tl.int64) * outputs * stored_inputs
    x_rows = x_ptr + rows_t[None, :].to(tl.int64) * inputs
    acc = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    steps = tl.cdiv(inputs, BLOCK_I)
    per_split = tl.cdiv(steps, SPLIT)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)

    if FORM == INT4:
        num_groups = inputs // GROUP
        w_at = w_slot + rows_o[:, None] * stored_inputs + tl.arange(0, GROUP_WORDS)[None, :]
        x_at = x_rows + tl.arange(0, GROUP)[:, None]
        scale_at = w_scale_ptr + tl.cast(slot, tl.int64) * outputs * num_groups + rows_o * num_groups
        scale = tl.load(scale_at + tl.minimum(first, num_groups - 1))
        for step in range(first, last):
            words = tl.load(w_at + step * GROUP_WORDS)
            x = tl.load(x_at + step * GROUP, mask=here[None, :], other=0.0)
            ahead = tl.load(scale_at + tl.minimum(step + 1, num_groups - 1))
            w = group_in_word_order(words, x_ptr.dtype.element_ty, IN_ASM, BLOCK_O)
            acc += tl.dot(w, x, input_precision="ieee") * scale.to(tl.float32)[:, None]
            scale = ahead
    else:
        i = tl.arange(0, BLOCK_I)
        w_at = w_slot + rows_o[:, None] * stored_inputs + i[None, :]
        x_at = x_rows + i[:, None]
        for step in range(first, last):
            if EVEN_I:
                w = tl.load(w_at + step * BLOCK_I)
                x = tl.load(x_at + step * BLOCK_I, mask=here[None, :], other=0.0)
            else:
                inside = step * BLOCK_I + i < inputs
                w = tl.load(w_at + step * BLOCK_I, mask=inside[None, :], other=0.0)
                x = tl.load(x_at + step * BLOCK_I, mask=inside[:, None] & here[None, :], other=0.0)
            if FORM == FP8:  # tensor cores sum fp8 products in few bits: not for longer than a block
                acc += tl.dot(w, x)
            else:
                acc = tl.dot(w, x, acc, input_precision="ieee")
        if FORM == FP8:
            w_scale = tl.load(w_scale_ptr + tl.cast(slot, tl.int64) * outputs + rows_o)
            acc = acc * w_scale[:, None] * tl.load(x_scale_ptr + rows_t, mask=here, other=0.0)[None, :]

    if SWIGLU:
        acc = gated(acc, ROUND, BLOCK_O, BLOCK_T)
    y_part = y_ptr + split * num_rows.to(tl.int64) * num_features
    write_features(acc, y_part, tile_o, rows_t.to(tl.int64), end, num_features, WORD_ORDER, FEATURES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a grouped matmul is cut. `split`: parts over the inputs, of which each is written on its own."""

    outputs: int
    rows: int
    inputs: int
    split: int = 1
    group: int = 1 << 20
    warps: int = 4
    stages: int = 4


def count_row_tiles(num_rows: int, num_slots: int, block: int, counts_S: Tensor | None) -> int:
    """Enough tiles of `block` rows for any counts: each slot's last one may be short."""
    if counts_S is None:
        return -(-num_rows // block)
    return num_rows // block + min(num_slots, num_rows)


def launch_grouped(
    x_NI: Tensor, x_scale_N1: Tensor | None, weight_SOW: Tensor, scale: Tensor | None, counts_S: Tensor | None,
    y_PNO: Tensor, form: int, tiles: Tiles, *, swiglu: bool = False, word_order: bool = False,
) -> None:  # fmt: skip
    """Writes the rows that `counts_S` counts (all if it is None: one slot) of `y_PNO` [split, N, O]."""
    num_rows, inputs = x_NI.shape
    num_slots, outputs, stored_inputs = weight_SOW.shape
    features = outputs // 2 if swiglu else outputs
    tiles_o = triton.cdiv(features, tiles.outputs // 2 if swiglu else tiles.outputs)
    tiles_t = count_row_tiles(num_rows, num_slots, tiles.rows, counts_S)
    grouped_kernel[(tiles_o * tiles_t, tiles.split)](
        x_NI, x_scale_N1, weight_SOW, scale, counts_S, y_PNO,
        num_rows, num_slots, outputs, inputs, stored_inputs, tiles_t, min(tiles.group, tiles_o),
        FORM=form, SWIGLU=swiglu, SINGLE=counts_S is None, WORD_ORDER=word_order,
        IN_ASM=x_NI.is_cuda and x_NI.dtype == torch.bfloat16,
        BLOCK_O=tiles.outputs, BLOCK_T=tiles.rows, BLOCK_I=tiles.inputs, SPLIT=tiles.split,
        SLOTS=triton.next_power_of_2(num_slots), EVEN_I=inputs % tiles.inputs == 0,
        ROUND=TRITON_DTYPES.get(y_PNO.dtype if swiglu else torch.float32),
        num_warps=tiles.warps, num_stages=tiles.stages, **early(),
    )  # fmt: skip
