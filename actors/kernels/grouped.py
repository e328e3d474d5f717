"""Matmuls over slots: rows sorted by slot times each slot's own weight, with counts that only the device knows.

Owns which kernel runs at which size, by measurement (benchmarks/gpu_experts.py). Knows nothing of routing. A slot
without rows costs nothing; rows beyond the counted ones are not read. One slot without counts is a plain matmul.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.kernels.libraries import has
from actors.kernels.quantize import dequantize_int4, placed_swiglu, placed_swiglu_quantized, to_word_order
from actors.kernels.route import Form, PlacedRows
from actors.kernels.triton_here import HAS_TRITON

if TYPE_CHECKING:
    from actors.kernels.few_rows_triton import FewRowsTiles
    from actors.kernels.one_row_triton import OneRowTiles

Engine = Literal["triton", "torch", "fbgemm", "reference"]

_FORMS: dict[Form, int] = {"plain": 0, "fp8": 1, "int4": 2}
STREAMING_ROWS_PER_SLOT = 64  # below, a step reads weights and little else
FBGEMM_ROWS_PER_SLOT = 256  # from here its grouped FP8 kernel is ahead of torch's
MAX_SLICE_NUMBERS = 1 << 25  # of a weight: a part of an expert, for which these two limits are others (FP8)
SLICE_STREAMING_ROWS_PER_SLOT, SLICE_FBGEMM_ROWS_PER_SLOT = 96, 96
LEAST_FBGEMM_ROWS, MANY_OUTPUTS = 9, 16384  # with fewer rows and as many outputs Triton is ahead of its dense one
_FBGEMM_OPS = ("f8f8bf16_rowwise_grouped_stacked", "f8f8bf16_rowwise")


def form_of(weight: Tensor) -> Form:
    """By dtype: int32 is packed INT4, float8_e4m3fn is FP8."""
    return "int4" if weight.dtype == torch.int32 else "fp8" if weight.dtype == torch.float8_e4m3fn else "plain"


def grouped_linear(x: PlacedRows, weight_SOI: Tensor, scale: Tensor | None, engine: Engine | None = None) -> Tensor:
    """Parts [P, N, O] whose sum is x @ W[slot].T for the placed rows; in `x.dtype` if P is 1, else in fp32.

    `weight_SOI`, `scale`: plain [S, O, I]; FP8 with fp32 [S, O]; INT4 int32 [S, O, I/8] with bf16 [S, O, I/128].
    `engine` is chosen by size unless it is given.
    """
    engine = engine or choose_engine(x, weight_SOI)
    if engine == "triton":
        return _with_triton(x, weight_SOI, scale, swiglu=False)
    if engine == "reference":
        return _slot_by_slot(x, weight_SOI, scale)[None]
    if form_of(weight_SOI) == "fp8":
        assert x.scale_N1 is not None
        assert scale is not None
        return _fp8_in_library(x.x_ND, x.scale_N1, weight_SOI, scale, x, engine)[None]
    if x.placement is None:
        return F.linear(x.x_ND, weight_SOI[0])[None]
    return F.grouped_mm(x.x_ND, weight_SOI.transpose(1, 2), offs=x.placement.ends_S)[None]


def grouped_swiglu(x: PlacedRows, weight_SNI: Tensor, scale: Tensor | None, engine: Engine | None = None) -> PlacedRows:
    """silu(gate) * up of the placed rows, ready for `grouped_linear` with weights of the same form.

    `weight_SNI`: [S, 2F, I] in one of the forms of `grouped_linear`, the gate's outputs first.
    """
    form, placement = form_of(weight_SNI), x.placement
    engine = engine or choose_engine(x, weight_SNI, swiglu=True)
    if engine == "triton" and form != "fp8":
        return PlacedRows(_with_triton(x, weight_SNI, scale, swiglu=True)[0], None, placement, x.dtype)
    gate_up_PNF = grouped_linear(x, weight_SNI, scale, engine)
    ends_S = None if placement is None else placement.ends_S
    if form == "fp8":
        return PlacedRows(*placed_swiglu_quantized(gate_up_PNF, ends_S, x.dtype), placement, x.dtype)
    y_NF = placed_swiglu(gate_up_PNF, ends_S, x.dtype, in_word_order=form == "int4")
    return PlacedRows(y_NF, None, placement, x.dtype)


def choose_engine(x: PlacedRows, weight_SOI: Tensor, *, swiglu: bool = False) -> Engine:
    """The fastest that is there. Nothing depends on counts: the same number of rows always takes the same kernels."""
    if not x.x_ND.is_cuda:
        return "reference"
    form, num_slots = form_of(weight_SOI), weight_SOI.shape[0]
    if _few_rows_tiles(x, weight_SOI, swiglu=swiglu):
        return "triton"
    in_blocks = x.dtype == torch.bfloat16 and all(n % 16 == 0 for n in weight_SOI.shape[1:])
    num_rows = x.x_ND.shape[0]
    is_slice = form == "fp8" and x.placement is not None and weight_SOI[0].numel() < MAX_SLICE_NUMBERS
    streaming_rows = SLICE_STREAMING_ROWS_PER_SLOT if is_slice else STREAMING_ROWS_PER_SLOT
    fbgemm_rows = SLICE_FBGEMM_ROWS_PER_SLOT if is_slice else FBGEMM_ROWS_PER_SLOT
    is_streaming = num_rows < streaming_rows * num_slots
    if x.placement is None:
        is_for_fbgemm = is_streaming and (num_rows >= LEAST_FBGEMM_ROWS or weight_SOI.shape[1] < MANY_OUTPUTS)
    else:
        is_for_fbgemm = num_rows >= fbgemm_rows * num_slots
    if form == "fp8" and in_blocks and is_for_fbgemm and all(map(has, _FBGEMM_OPS)):
        return "fbgemm"
    if form != "int4" and in_blocks and (not is_streaming or (form == "plain" and x.placement is None)):
        return "torch"
    return "triton" if HAS_TRITON else "reference"


def _few_rows_tiles(x: PlacedRows, weight_SOI: Tensor, *, swiglu: bool) -> "FewRowsTiles | OneRowTiles | None":
    if not (HAS_TRITON and x.dtype == torch.bfloat16):
        return None
    from actors.kernels.grouped_tiles import choose_few_rows

    (num_rows, inputs), (num_slots, outputs, _) = x.x_ND.shape, weight_SOI.shape
    form, is_single = form_of(weight_SOI), x.placement is None
    return choose_few_rows(form, num_rows, inputs, num_slots, outputs, swiglu=swiglu, is_single=is_single)


def _with_triton(x: PlacedRows, weight_SOI: Tensor, scale: Tensor | None, *, swiglu: bool) -> Tensor:
    from actors.kernels.few_rows_triton import launch_few_rows
    from actors.kernels.grouped_tiles import choose_tiles
    from actors.kernels.grouped_triton import Tiles, launch_grouped
    from actors.kernels.one_row_triton import OneRowTiles, launch_one_row

    form, (num_rows, inputs), (num_slots, outputs, _) = form_of(weight_SOI), x.x_ND.shape, weight_SOI.shape
    few = _few_rows_tiles(x, weight_SOI, swiglu=swiglu)
    features, device = outputs // 2 if swiglu else outputs, weight_SOI.device
    if isinstance(few, OneRowTiles):
        y_1NO = torch.empty(1, 1, features, dtype=x.dtype, device=device)
        launch_one_row(x.x_ND, weight_SOI[0], y_1NO[0], few, swiglu=swiglu)
        return y_1NO
    tiles = few or choose_tiles(form, num_rows, inputs, num_slots, outputs, swiglu=swiglu)
    dtype = torch.float32 if tiles.split > 1 else x.dtype
    y_PNO = torch.empty(tiles.split, num_rows, features, dtype=dtype, device=device)
    counts_S = None if x.placement is None else x.placement.counts_S
    weights = weight_SOI, scale, counts_S, y_PNO, _FORMS[form]
    word_order = swiglu and form == "int4"
    if isinstance(tiles, Tiles):
        launch_grouped(x.x_ND, x.scale_N1, *weights, tiles, swiglu=swiglu, word_order=word_order)
    else:
        launch_few_rows(x.x_ND, *weights, tiles, swiglu=swiglu, word_order=word_order)
    return y_PNO


def _fp8_in_library(
    x_NI: Tensor, scale_N1: Tensor, weight_SOI: Tensor, scale_SO: Tensor, x: PlacedRows, engine: Engine
) -> Tensor:
    placement = x.placement
    if engine == "fbgemm":
        ops = torch.ops.fbgemm
        if placement is None:
            return ops.f8f8bf16_rowwise(x_NI, weight_SOI[0], scale_N1, scale_SO[0])  # type: ignore[no-any-return]
        sizes = placement.counts_S
        return ops.f8f8bf16_rowwise_grouped_stacked(x_NI, weight_SOI, scale_N1, scale_SO, sizes)  # type: ignore[no-any-return]
    if placement is None:
        weight_IO, scale_1O = weight_SOI[0].t(), scale_SO[:1]
        return torch._scaled_mm(x_NI, weight_IO, scale_N1, scale_1O, out_dtype=x.dtype, use_fast_accum=True)
    weight_SIO = weight_SOI.transpose(1, 2)
    return torch._scaled_grouped_mm(
        x_NI, weight_SIO, scale_N1.flatten(), scale_SO, offs=placement.ends_S, out_dtype=x.dtype, use_fast_accum=True
    )


def _slot_by_slot(x: PlacedRows, weight_SOI: Tensor, scale: Tensor | None) -> Tensor:
    """Waits for the device to learn the counts."""
    y_NO = torch.empty(x.x_ND.shape[0], weight_SOI.shape[1], dtype=x.dtype, device=x.x_ND.device)
    counts = [x.x_ND.shape[0]] if x.placement is None else x.placement.counts_S.tolist()
    begin = 0
    for slot, count in enumerate(counts):
        if count:
            rows = slice(begin, begin + count)
            scale_N1 = None if x.scale_N1 is None else x.scale_N1[rows]
            slot_scale = None if scale is None else scale[slot]
            y_NO[rows] = matmul_reference(x.x_ND[rows], scale_N1, weight_SOI[slot], slot_scale, x.dtype)
            begin += count
    return y_NO


def matmul_reference(
    x_NI: Tensor, scale_N1: Tensor | None, weight_OI: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x @ W.T in fp32, rounded once. FP8: (q_x . q_w) * s_row * scale. INT4: rows in word order."""
    form = form_of(weight_OI)
    if form == "fp8":
        assert scale_N1 is not None
        assert scale is not None
        return (F.linear(x_NI.float(), weight_OI.float()) * scale_N1 * scale).to(dtype)
    if form == "int4":
        assert scale is not None
        return F.linear(x_NI.float(), to_word_order(dequantize_int4(weight_OI, scale, torch.float32))).to(dtype)
    return F.linear(x_NI.float(), weight_OI.float()).to(dtype)
