"""How the Triton matmul is cut at each size, by measurement on an H200 (benchmarks/gpu_experts.py).

The inputs are cut, and their parts summed, by the rows and the shape of one slot: never by how many slots there are.
So an expert computes the same bits wherever it lies, and goes on to do so when its layer moves to more memory, up to
steps so large that other kernels take them (in INT4 from 65 rows on).
"""

from actors.kernels.few_rows_triton import FewRowsTiles
from actors.kernels.grouped_triton import Tiles
from actors.kernels.one_row_triton import OneRowTiles
from actors.kernels.route import Form

NUM_MULTIPROCESSORS = 132  # of an H200
MIN_PROGRAMS = 2 * NUM_MULTIPROCESSORS
MAX_SPLIT_ROWS = 4  # of FP8
SLICE_STREAMING_ROWS = 96  # per slot: tiles of 64 rows are ahead of torch's kernel on slices of experts
MAX_FEW_INT4_ROWS, MAX_FEW_INT4_ROWS_PER_SLOT = 64, 4
MAX_FEW_INT4_ROWS_OF_GATE_UP, MAX_FEW_INT4_ROWS_OF_DOWN = 8, 16  # where one slot takes all rows
MAX_INT4_ROWS_OF_ONE_SLOT, MAX_INT4_ROWS_PER_SLOT = 256, 128  # with more, tiles are those of all forms
MAX_FEW_PLAIN_ROWS = 8


def choose_tiles(form: Form, num_rows: int, inputs: int, num_slots: int, outputs: int, *, swiglu: bool) -> Tiles:
    """Tiles for `num_rows` rows spread evenly over `num_slots` slots, or the best guess if they are not."""
    rows_per_slot = num_rows / num_slots
    if form == "int4" and num_slots == 1 and num_rows <= MAX_INT4_ROWS_OF_ONE_SLOT:
        return _int4_tiles_of_one_slot(num_rows, outputs)
    if form == "int4" and rows_per_slot <= MAX_INT4_ROWS_PER_SLOT:
        return _int4_tiles(rows_per_slot)
    if form == "fp8" and 48 < rows_per_slot <= SLICE_STREAMING_ROWS:
        return Tiles(outputs=128, rows=64, inputs=128, warps=4, stages=4)
    if rows_per_slot > 48:
        return Tiles(outputs=128, rows=128, inputs=128 if form != "plain" else 64, group=16, warps=8, stages=3)
    rows = 64 if rows_per_slot > 24 else 32 if rows_per_slot > 12 else 16
    tall = 64 if rows == 16 else 128
    if form == "fp8":
        split = 4 if num_rows <= MAX_SPLIT_ROWS and outputs // 64 < NUM_MULTIPROCESSORS and inputs >= 2048 else 1
        return Tiles(outputs=tall, rows=rows, inputs=256, split=split, stages=5 if tall == 64 and split == 1 else 4)
    programs = num_rows * -(-outputs // 64)
    split = 1
    while not swiglu and split < 8 and programs * split < MIN_PROGRAMS and inputs // 64 >= 8 * split:
        split *= 2
    return Tiles(outputs=64, rows=rows, inputs=64, split=split, warps=4, stages=5)


def _int4_tiles(rows_per_slot: float) -> Tiles:
    """Of several slots."""
    if rows_per_slot > 48:
        return Tiles(outputs=128, rows=64, inputs=128, group=16)
    return Tiles(outputs=64, rows=32 if rows_per_slot > 12 else 16, inputs=128)


def _int4_tiles_of_one_slot(num_rows: int, outputs: int) -> Tiles:
    """Wide where that leaves a program for each multiprocessor."""
    rows = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    is_wide = rows == 64 and outputs // 128 * -(-num_rows // 64) >= NUM_MULTIPROCESSORS
    return Tiles(outputs=128 if is_wide else 64, rows=rows, inputs=128, stages=5 if rows == 32 else 4)


def choose_few_rows(
    form: Form, num_rows: int, inputs: int, num_slots: int, outputs: int, *, swiglu: bool, is_single: bool
) -> FewRowsTiles | OneRowTiles | None:
    """Tiles of the kernels of few rows where they are ahead, for `num_rows` rows of all slots together; else None.

    `is_single`: one slot that takes all rows.
    """
    if form == "int4":
        return _few_int4_rows(num_rows, inputs, num_slots, swiglu=swiglu, is_single=is_single)
    if form == "fp8" or not is_single or num_rows > MAX_FEW_PLAIN_ROWS:
        return None
    if num_rows == 1:
        step = next(step for step in (1024, 512, 256) if inputs % step == 0 or step == 256)
        return OneRowTiles(outputs=8 if swiglu else 4, inputs=step, unroll=1 if step == 1024 else 4, warps=4)
    # One program for about each multiprocessor, or cuBLAS is ahead.
    block = next((block for block in (16, 32, 64) if 96 <= -(-outputs // block) <= 132), None)
    if block is None or inputs % 512 != 0:
        return None
    return FewRowsTiles(outputs=block, rows=8, inputs=128, warps=4, stages=5 if block == 16 else 3)


def _few_int4_rows(
    num_rows: int, inputs: int, num_slots: int, *, swiglu: bool, is_single: bool
) -> FewRowsTiles | None:  # fmt: skip
    if is_single:
        max_rows = MAX_FEW_INT4_ROWS_OF_GATE_UP if swiglu else MAX_FEW_INT4_ROWS_OF_DOWN
    else:
        max_rows = max(MAX_FEW_INT4_ROWS, MAX_FEW_INT4_ROWS_PER_SLOT * num_slots)
    if num_rows > max_rows or inputs % 512 != 0:
        return None
    if swiglu and (is_single or num_rows == 1):
        return FewRowsTiles(outputs=32, rows=8, inputs=128, warps=4, stages=4)
    if swiglu or num_rows > 32:
        return FewRowsTiles(outputs=64, rows=8, inputs=128, warps=2, stages=3)
    if num_rows == 1 and inputs % 2048 == 0:  # one row has too few programs
        return FewRowsTiles(outputs=64, rows=8, inputs=128, warps=4, stages=3, split=4)
    return FewRowsTiles(outputs=32, rows=8, inputs=128, warps=4, stages=3)
