"""Triton kernels of `route.py` and their launches: placement, and the gathering of rows into their places.

Owns how rows are counted and ordered without the host. Knows nothing of what experts compute.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.early_triton import await_inputs, early
from actors.kernels.quantize_triton import MAX_FEW, WORD_ORDER, row_warps, word_order, write_row

BLOCK_ROWS = 256  # rows that a program of the large placement counts


@triton.jit
def load_slots(ids_ptr, table_ptr, rows, num_rows, TABLE: tl.constexpr):
    """The slot of each row, -1 where there is none. Rows from `num_rows` on have none."""
    ids = tl.load(ids_ptr + rows, mask=rows < num_rows, other=-1)
    if TABLE:
        return tl.load(table_ptr + ids, mask=ids >= 0, other=-1).to(tl.int32)
    return ids.to(tl.int32)


@triton.jit(do_not_specialize=["num_rows"])
def count_kernel(
    ids_ptr,
    table_ptr,
    block_counts_ptr,
    num_rows,
    num_slots,
    TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Rows of each slot in each block of rows: [blocks, slots]."""
    await_inputs()
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    slots = tl.arange(0, SLOTS)
    of_row = load_slots(ids_ptr, table_ptr, rows, num_rows, TABLE)
    counts = tl.sum((of_row[:, None] == slots[None, :]).to(tl.int32), 0)
    tl.store(block_counts_ptr + block * num_slots + slots, counts, mask=slots < num_slots)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def place_kernel(
    ids_ptr, table_ptr, block_counts_ptr, place_ptr, counts_ptr, ends_ptr, num_rows, num_slots, num_blocks,
    TABLE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Where each row of a block goes: after the rows of smaller slots, and those of its own slot before it."""
    await_inputs()
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    slots = tl.arange(0, SLOTS)
    counts = tl.zeros((SLOTS,), tl.int32)
    before = tl.zeros((SLOTS,), tl.int32)
    for other in range(num_blocks):
        some = tl.load(block_counts_ptr + other * num_slots + slots, mask=slots < num_slots, other=0)
        counts += some
        before += tl.where(other < block, some, 0)
    ends = tl.cumsum(counts, 0)
    if block == 0:
        tl.store(counts_ptr + slots, counts.to(tl.int64), mask=slots < num_slots)
        tl.store(ends_ptr + slots, ends, mask=slots < num_slots)
    of_row = load_slots(ids_ptr, table_ptr, rows, num_rows, TABLE)
    is_of = of_row[:, None] == slots[None, :]
    earlier = tl.cumsum(is_of.to(tl.int32), 0) - 1 + (ends - counts + before)[None, :]
    place = tl.sum(tl.where(is_of, earlier, 0), 1)
    tl.store(place_ptr + rows, tl.where(of_row >= 0, place, -1), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def gather_kernel(
    x_ptr, scores_ptr, ids_ptr, table_ptr, place_ptr, counts_ptr, ends_ptr, y_ptr, scale_ptr,
    num_rows, num_slots, width,
    TOP_K: tl.constexpr, PLACED: tl.constexpr, TABLE: tl.constexpr, SCORED: tl.constexpr, MODE: tl.constexpr,
    FEW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes a row, times its score, to its place. Unless PLACED each finds the place itself, among at most
    ROWS rows, and further programs write the count and end of a slot each; FEW of them read the row meanwhile.
    """
    await_inputs()
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x_at = x_ptr + (row // TOP_K).to(tl.int64) * width + (word_order(columns) if MODE == WORD_ORDER else columns)
    if FEW:
        values = tl.load(x_at, mask=mask & (row < num_rows), other=0.0)
    if not PLACED:
        rows = tl.arange(0, ROWS)
        slots = load_slots(ids_ptr, table_ptr, rows, num_rows, TABLE)
        if row >= num_rows:
            slot = row - num_rows
            tl.store(counts_ptr + slot, tl.sum((slots == slot).to(tl.int64), 0))
            tl.store(ends_ptr + slot, tl.sum(((slots >= 0) & (slots <= slot)).to(tl.int32), 0))
            return
        slot = tl.sum(tl.where(rows == row, slots, 0), 0)
        is_before = (slots >= 0) & ((slots < slot) | ((slots == slot) & (rows < row)))
        place = tl.where(slot >= 0, tl.sum(is_before.to(tl.int32), 0), -1)
        tl.store(place_ptr + row, place)
    else:
        place = tl.load(place_ptr + row)
    if place < 0:
        return
    if not FEW:
        values = tl.load(x_at, mask=mask, other=0.0)
    if SCORED:
        score = tl.load(scores_ptr + row)
        values = (values.to(tl.float32) * score.to(tl.float32)).to(x_ptr.dtype.element_ty)
    write_row(values.to(tl.float32), columns, mask, y_ptr, scale_ptr, place.to(tl.int64), width, MODE)


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    parts_ptr, place_ptr, y_ptr, num_rows, width,
    PARTS: tl.constexpr, TOP_K: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[token] = the sum of its rows, each rounded as an expert's answer is; rows that are nowhere count as zeros.

    Unless PLACED row and token are one.
    """
    await_inputs()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(place_ptr + token * TOP_K + k).to(tl.int64) if PLACED else token
        value = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            at = parts_ptr + (part * num_rows.to(tl.int64) + place) * width + columns
            value += tl.load(at, mask=mask & (place >= 0), other=0.0).to(tl.float32)
        total += value.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + token * width + columns, total.to(y_ptr.dtype.element_ty), mask=mask)


def launch_place(ids_N: Tensor, table_E: Tensor | None, place_N: Tensor, counts_S: Tensor, ends_S: Tensor) -> None:
    num_rows, num_slots = ids_N.shape[0], counts_S.shape[0]
    num_blocks = triton.cdiv(num_rows, BLOCK_ROWS)
    block_counts = torch.empty(num_blocks, num_slots, dtype=torch.int32, device=ids_N.device)
    slots = triton.next_power_of_2(num_slots)
    count_kernel[(num_blocks,)](
        ids_N, table_E, block_counts, num_rows, num_slots, TABLE=table_E is not None, ROWS=BLOCK_ROWS, SLOTS=slots,
        **early(),
    )  # fmt: skip
    place_kernel[(num_blocks,)](
        ids_N, table_E, block_counts, place_N, counts_S, ends_S, num_rows, num_slots, num_blocks,
        TABLE=table_E is not None, ROWS=BLOCK_ROWS, SLOTS=slots, num_warps=8, **early(),
    )  # fmt: skip


def launch_gather(
    x_TD: Tensor, scores_N: Tensor | None, ids_N: Tensor, table_E: Tensor | None,
    placement: tuple[Tensor, Tensor, Tensor], y_ND: Tensor, scale_N1: Tensor | None, mode: int, is_placed: bool,
) -> None:  # fmt: skip
    place_N, counts_S, ends_S = placement
    num_rows, num_slots, width = ids_N.shape[0], counts_S.shape[0], x_TD.shape[1]
    block = triton.next_power_of_2(width)
    gather_kernel[(num_rows if is_placed else num_rows + num_slots,)](
        x_TD, scores_N, ids_N, table_E, place_N, counts_S, ends_S, y_ND, scale_N1, num_rows, num_slots, width,
        TOP_K=max(1, num_rows // x_TD.shape[0]), PLACED=is_placed, TABLE=table_E is not None,
        SCORED=scores_N is not None, MODE=mode, FEW=num_rows <= MAX_FEW,
        ROWS=1 if is_placed else triton.next_power_of_2(num_rows), BLOCK=block,
        num_warps=row_warps(block, num_rows) if num_rows <= MAX_FEW else min(8, max(1, block // 512)), **early(),
    )  # fmt: skip


def launch_combine(parts_PND: Tensor, place_N: Tensor | None, y_TD: Tensor) -> None:
    num_parts, num_rows, width = parts_PND.shape
    num_tokens = y_TD.shape[0]
    block = min(2048 if num_tokens > 64 else 512, triton.next_power_of_2(width))
    combine_kernel[(num_tokens, triton.cdiv(width, block))](
        parts_PND, place_N, y_TD, num_rows, width,
        PARTS=num_parts, TOP_K=num_rows // num_tokens, PLACED=place_N is not None, BLOCK=block, num_warps=4,
        **early(),
    )  # fmt: skip
