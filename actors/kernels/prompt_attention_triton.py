"""The Triton form of `prompt_attention.py`: one program per kv head and tile of rows.

Needs Triton: imported only where it is installed. Names: Q queries (of the tile's rows, and of the kv head's group),
N keys.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "chunk_tokens"])
def prompt_kernel(
    q, pages, table, seats, positions, out, q_stride, page_stride, slot_stride, table_stride, table_width, out_stride,
    num_rows, chunk_tokens, scale,
    PAGE_TOKENS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TILE_ROWS: tl.constexpr,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's rows of prompts are of the request of its first row; those that are none's are padding."""
    kv_head = tl.program_id(0)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * TILE_ROWS  # those that see most begin first
    seat = tl.load(seats + first_row)
    if seat < 0:
        return
    query = tl.arange(0, QUERIES)
    row = first_row + query // GROUP
    head = kv_head * GROUP + query % GROUP
    seat_Q = tl.load(seats + row, mask=(query < TILE_ROWS * GROUP) & (row < num_rows), other=-1)
    is_query = (seat_Q == seat)[:, None]
    first_position = tl.load(positions + first_row).to(tl.int32)
    position_Q = first_position + query // GROUP
    num_positions = tl.max(tl.where(seat_Q == seat, query // GROUP + 1, 0), axis=0)
    dims = tl.arange(0, HEAD_DIM)
    at = row[:, None].to(tl.int64)
    q_Qd = tl.load(q + at * q_stride + (head * HEAD_DIM)[:, None] + dims[None, :], mask=is_query, other=0.0)

    start = 0
    if chunk_tokens > 0:
        start = first_position - first_position % chunk_tokens
    high = first_position + num_positions
    table_row = table + seat.to(tl.int64) * table_stride
    keys = pages + kv_head * HEAD_DIM
    values_offset = NUM_KV_HEADS * HEAD_DIM
    lane = tl.arange(0, KEYS)
    page_N = tl.load(table_row + (start + lane) // PAGE_TOKENS % table_width, mask=start + lane < high, other=0)
    peak_Q = tl.full((QUERIES,), float("-inf"), tl.float32)
    sum_Q = tl.zeros((QUERIES,), tl.float32)
    sum_Qd = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    for tile in range(start, high, KEYS):
        n = tile + lane
        is_key = n < high
        at_N = keys + page_N.to(tl.int64) * page_stride + (n % PAGE_TOKENS) * slot_stride
        k_Nd = tl.load(at_N[:, None] + dims[None, :], mask=is_key[:, None], other=0.0).to(q_Qd.dtype)
        # Masked, for what a page's last owner left may not be finite, and 0 * NaN is NaN.
        v_Nd = tl.load(at_N[:, None] + values_offset + dims[None, :], mask=is_key[:, None], other=0.0).to(q_Qd.dtype)
        # A tile ahead, so that the loads of keys and values never wait for one another's addresses.
        page_N = tl.load(table_row + (n + KEYS) // PAGE_TOKENS % table_width, mask=n + KEYS < high, other=0)
        scores_QN = tl.dot(q_Qd, tl.trans(k_Nd), input_precision=PRECISION) * scale
        scores_QN = tl.where(n[None, :] <= position_Q[:, None], scores_QN, float("-inf"))
        new_peak_Q = tl.maximum(peak_Q, tl.max(scores_QN, axis=1))
        shrink_Q = tl.exp2(peak_Q - new_peak_Q)
        share_QN = tl.exp2(scores_QN - new_peak_Q[:, None])
        sum_Q = sum_Q * shrink_Q + tl.sum(share_QN, axis=1)
        sum_Qd = tl.dot(share_QN.to(q_Qd.dtype), v_Nd, sum_Qd * shrink_Q[:, None], input_precision=PRECISION)
        peak_Q = new_peak_Q
    out_at = out + at * out_stride + (head * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(out_at, (sum_Qd / sum_Q[:, None]).to(out.dtype.element_ty), mask=is_query)
