"""Triton kernels of `route.py` and their launches: choice, placement, and the gathering of rows into their places.

Owns how rows are counted and ordered without the host. Knows nothing of what experts compute.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.kernels.quantize_triton import MAX_FEW, WORD_ORDER, row_warps, word_order, write_row

BLOCK_ROWS = 256  # rows that a program of the large placement counts
GATE_TILE = 1 << 14  # numbers of the router that a program of the gate multiplies at once


@triton.jit
def write_choice(
    logits, positions_ptr, is_padding_ptr, ids_ptr, scores_ptr, token, num_experts,
    TOP_K: tl.constexpr, UNIFORM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The TOP_K largest of a token's BLOCK logits, the first of equals, and their sigmoids. A NaN is never chosen."""
    experts = tl.arange(0, BLOCK)
    free = experts < num_experts
    logits = tl.where(free & (logits == logits), logits, -float("inf"))
    for k in tl.static_range(TOP_K):
        if UNIFORM:
            chosen = ((tl.load(positions_ptr + token) * TOP_K + k) % num_experts).to(tl.int32)
            value = tl.sum(tl.where(experts == chosen, logits, 0.0), 0)
        else:
            value = tl.max(tl.where(free, logits, -float("inf")), 0)
            chosen = tl.min(tl.where(free & (logits == value), experts, BLOCK), 0)
            free = free & (experts != chosen)
        score = 1.0 / (1.0 + tl.exp(-value))
        tl.store(scores_ptr + token * TOP_K + k, score.to(scores_ptr.dtype.element_ty))
        if PADDED:
            chosen = tl.where(tl.load(is_padding_ptr + token) != 0, -1, chosen)
        tl.store(ids_ptr + token * TOP_K + k, chosen.to(tl.int64))


@triton.jit
def choose_kernel(
    logits_ptr, positions_ptr, is_padding_ptr, ids_ptr, scores_ptr, num_experts,
    TOP_K: tl.constexpr, UNIFORM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + token * num_experts + experts, mask=experts < num_experts, other=-float("inf"))
    write_choice(
        logits, positions_ptr, is_padding_ptr, ids_ptr, scores_ptr, token, num_experts, TOP_K, UNIFORM, PADDED, BLOCK
    )


@triton.jit
def gate_kernel(
    x_ptr, router_ptr, positions_ptr, is_padding_ptr, ids_ptr, scores_ptr, num_experts, width,
    TOP_K: tl.constexpr, UNIFORM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_I: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """One program reads the whole router for one token, and chooses. A token's answer does not depend on others."""
    token = tl.program_id(0).to(tl.int64)
    experts, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_I)
    products = tl.zeros((BLOCK, BLOCK_I), tl.float32)
    for step in tl.static_range(STEPS):
        at = step * BLOCK_I + columns
        inside = at < width
        x = tl.load(x_ptr + token * width + at, mask=inside, other=0.0).to(tl.float32)
        router_at = router_ptr + experts[:, None] * width + at[None, :]
        router = tl.load(router_at, mask=(experts < num_experts)[:, None] & inside[None, :], other=0.0)
        products += router.to(tl.float32) * x[None, :]
    logits = tl.sum(products, 1)
    write_choice(
        logits, positions_ptr, is_padding_ptr, ids_ptr, scores_ptr, token, num_experts, TOP_K, UNIFORM, PADDED, BLOCK
    )


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


def launch_choose(
    logits_TE: Tensor, positions_T: Tensor | None, is_padding_T1: Tensor | None, ids_TK: Tensor, scores_TK: Tensor
) -> None:
    num_tokens, num_experts = logits_TE.shape
    choose_kernel[(num_tokens,)](
        logits_TE, positions_T, _as_bytes(is_padding_T1), ids_TK, scores_TK, num_experts,
        TOP_K=ids_TK.shape[1], UNIFORM=positions_T is not None, PADDED=is_padding_T1 is not None,
        BLOCK=triton.next_power_of_2(num_experts), num_warps=1,
    )  # fmt: skip


def launch_gate(
    x_TD: Tensor, router_ED: Tensor, positions_T: Tensor | None, is_padding_T1: Tensor | None,
    ids_TK: Tensor, scores_TK: Tensor,
) -> None:  # fmt: skip
    num_experts, width = router_ED.shape
    block = triton.next_power_of_2(num_experts)
    block_i = min(GATE_TILE // block, triton.next_power_of_2(width))
    gate_kernel[(x_TD.shape[0],)](
        x_TD, router_ED, positions_T, _as_bytes(is_padding_T1), ids_TK, scores_TK, num_experts, width,
        TOP_K=ids_TK.shape[1], UNIFORM=positions_T is not None, PADDED=is_padding_T1 is not None, BLOCK=block,
        BLOCK_I=block_i, STEPS=triton.cdiv(width, block_i), num_warps=16,
    )  # fmt: skip


def _as_bytes(is_padding_T1: Tensor | None) -> Tensor | None:
    return None if is_padding_T1 is None else is_padding_T1.contiguous().view(torch.int8)


def launch_place(ids_N: Tensor, table_E: Tensor | None, place_N: Tensor, counts_S: Tensor, ends_S: Tensor) -> None:
    num_rows, num_slots = ids_N.shape[0], counts_S.shape[0]
    num_blocks = triton.cdiv(num_rows, BLOCK_ROWS)
    block_counts = torch.empty(num_blocks, num_slots, dtype=torch.int32, device=ids_N.device)
    slots = triton.next_power_of_2(num_slots)
    count_kernel[(num_blocks,)](
        ids_N, table_E, block_counts, num_rows, num_slots, TABLE=table_E is not None, ROWS=BLOCK_ROWS, SLOTS=slots
    )
    place_kernel[(num_blocks,)](
        ids_N, table_E, block_counts, place_N, counts_S, ends_S, num_rows, num_slots, num_blocks,
        TABLE=table_E is not None, ROWS=BLOCK_ROWS, SLOTS=slots, num_warps=8,
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
        num_warps=row_warps(block, num_rows) if num_rows <= MAX_FEW else min(8, max(1, block // 512)),
    )  # fmt: skip


def launch_combine(parts_PND: Tensor, place_N: Tensor | None, y_TD: Tensor) -> None:
    num_parts, num_rows, width = parts_PND.shape
    num_tokens = y_TD.shape[0]
    block = min(2048 if num_tokens > 64 else 512, triton.next_power_of_2(width))
    combine_kernel[(num_tokens, triton.cdiv(width, block))](
        parts_PND, place_N, y_TD, num_rows, width,
        PARTS=num_parts, TOP_K=num_rows // num_tokens, PLACED=place_N is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
