"""How the Triton matmul is cut at each size, by measurement on an H200 (benchmarks/gpu_experts.py --tune)."""

from actors.kernels.grouped_triton import Tiles
from actors.kernels.route import Form

MIN_PROGRAMS = 264  # two for each multiprocessor of an H200


def choose_tiles(form: Form, num_rows: int, inputs: int, num_slots: int, outputs: int, *, swiglu: bool) -> Tiles:
    """Tiles for `num_rows` rows spread evenly over `num_slots` slots, or the best guess if they are not."""
    rows_per_slot = num_rows / num_slots
    if rows_per_slot > 48:
        return Tiles(outputs=128, rows=128, inputs=128 if form != "plain" else 64, group=16, warps=8, stages=3)
    rows = 64 if rows_per_slot > 24 else 32 if rows_per_slot > 12 else 16
    step = 64 if form == "plain" else 128
    programs = min(num_rows, num_slots) * -(-outputs // 64)
    split = 1
    while not swiglu and split < 8 and programs * split < MIN_PROGRAMS and inputs // step >= 8 * split:
        split *= 2
    return Tiles(outputs=64, rows=rows, inputs=step, split=split, warps=4, stages=5)
