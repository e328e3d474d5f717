"""How the Triton matmul is cut at each size, by measurement on an H200 (benchmarks/gpu_experts.py).

The inputs are cut, and their parts summed, by the rows and the shape of one slot: never by how many slots there are.
So an expert computes the same bits wherever it lies, and goes on to do so when its layer moves to more memory, up to
steps so large that other kernels take them.
"""

from actors.kernels.few_rows_triton import FewRowsTiles
from actors.kernels.grouped_triton import Tiles
from actors.kernels.route import Form

MIN_PROGRAMS = 264  # two for each multiprocessor of an H200
MAX_FEW_ROWS = 16
MAX_FEW_INT4_ROWS = 64


def choose_tiles(form: Form, num_rows: int, inputs: int, num_slots: int, outputs: int, *, swiglu: bool) -> Tiles:
    """Tiles for `num_rows` rows spread evenly over `num_slots` slots, or the best guess if they are not."""
    rows_per_slot = num_rows / num_slots
    if rows_per_slot > 48:
        return Tiles(outputs=128, rows=128, inputs=128 if form != "plain" else 64, group=16, warps=8, stages=3)
    rows = 64 if rows_per_slot > 24 else 32 if rows_per_slot > 12 else 16
    tall = 64 if rows == 16 else 128
    if form == "fp8":
        split = 2 if num_rows <= MAX_FEW_ROWS and outputs // 64 < MIN_PROGRAMS // 2 else 1
        return Tiles(outputs=tall, rows=rows, inputs=256, split=split, stages=5 if tall == 64 and split == 1 else 4)
    if form == "int4":
        # Parts begin at the same group in either kind of tiles: with one group of 128 in a step, or with four.
        can_split = not swiglu and num_rows * outputs < MIN_PROGRAMS * 128 and inputs % (4 * 512) == 0
        split = 4 if can_split else 1
        if rows == 16 and inputs % 512 == 0:  # 256 bytes of an output's words at once
            return Tiles(outputs=64, rows=rows, inputs=512, split=split, stages=3)
        return Tiles(outputs=tall, rows=rows, inputs=128, split=split, stages=4)
    programs = num_rows * -(-outputs // 64)
    split = 1
    while not swiglu and split < 8 and programs * split < MIN_PROGRAMS and inputs // 64 >= 8 * split:
        split *= 2
    return Tiles(outputs=64, rows=rows, inputs=64, split=split, warps=4, stages=5)


def choose_few_rows(form: Form, num_rows: int, inputs: int, outputs: int, *, swiglu: bool) -> FewRowsTiles | None:
    """Tiles of the kernel of few rows where it is ahead, for `num_rows` rows of all slots together; else None."""
    if form != "int4" or num_rows > MAX_FEW_INT4_ROWS or inputs % 512 != 0:
        return None
    if swiglu:
        return FewRowsTiles(outputs=64, rows=8, inputs=128, warps=4 if num_rows == 1 else 2, stages=3)
    split = 4 if num_rows * outputs < MIN_PROGRAMS * 128 and inputs % 2048 == 0 else 1
    return FewRowsTiles(outputs=64, rows=8, inputs=128, warps=4, stages=3, split=split)
