"""The Triton form of `decode_attention.py`: one program per kv head and piece of a row's keys.

Owns how programs find their work and leave what they found to the last of a row, which joins it. Needs Triton: imported
only where it is installed. Names: R rows, G queries of a kv head and the head's key, N keys, J queries that are joined.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, type-arg, misc"

import triton
import triton.language as tl

from actors.kernels.early_triton import await_inputs
from actors.kernels.heads_triton import as_kept, turned


@triton.jit
def _pages_of(table_row, n, high, first_column, table_width, PAGE_TOKENS: tl.constexpr):
    column = first_column + n // PAGE_TOKENS
    column = tl.where(column >= table_width, column - table_width, column)
    return tl.load(table_row + column, mask=n < high, other=0).to(tl.int64)


@triton.jit
def _join_at_once(
    out_at, parts, weights, first, num_pieces, piece_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, JOIN_GROUP: tl.constexpr, JOIN_PIECES: tl.constexpr,
):  # fmt: skip
    """As `_join`, with JOIN_PIECES in one tensor. That takes a microsecond more, but also as many registers as the loop
    over keys needs to begin its next loads early (H200, 256 rows: 75.7 us, and 82.2 with `_join`).
    """
    j = tl.arange(0, JOIN_GROUP)
    dims = tl.arange(0, HEAD_DIM)
    is_joined = j < GROUP
    peak_J = tl.full((JOIN_GROUP,), float("-inf"), tl.float32)
    sum_J = tl.zeros((JOIN_GROUP,), tl.float32)
    joined_Jd = tl.zeros((JOIN_GROUP, HEAD_DIM), tl.float32)
    for done in tl.range(0, num_pieces, JOIN_PIECES, num_stages=1):
        s = done + tl.arange(0, JOIN_PIECES)
        is_there = (s < num_pieces)[:, None]
        theirs = first + s[:, None] * piece_stride + j[None, :]
        mask = is_there & is_joined[None, :]
        at_SJd = parts + theirs[:, :, None].to(tl.int64) * HEAD_DIM + dims[None, None, :]
        part_SJd = tl.load(at_SJd, mask=mask[:, :, None], other=0.0)
        log_SJ = tl.where(is_there, tl.load(weights + theirs, mask=mask, other=0.0), float("-inf"))
        new_peak_J = tl.maximum(peak_J, tl.max(log_SJ, axis=0))
        weight_SJ = tl.exp2(log_SJ - new_peak_J[None, :])
        shrink_J = tl.exp2(peak_J - new_peak_J)
        sum_J = sum_J * shrink_J + tl.sum(weight_SJ, axis=0)
        joined_Jd = joined_Jd * shrink_J[:, None] + tl.sum(part_SJd * weight_SJ[:, :, None], axis=0)
        peak_J = new_peak_J
    at = out_at + j[:, None] * HEAD_DIM + dims[None, :]
    tl.store(at, (joined_Jd / sum_J[:, None]).to(out_at.dtype.element_ty), mask=is_joined[:, None])


@triton.jit
def _join(
    out_at, parts, weights, first, num_pieces, piece_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, JOIN_GROUP: tl.constexpr, JOIN_PIECES: tl.constexpr,
):  # fmt: skip
    """What the pieces of a row found, by their weights in base-2 logarithms. Loads of JOIN_PIECES are in flight."""
    j = tl.arange(0, JOIN_GROUP)
    dims = tl.arange(0, HEAD_DIM)
    is_joined = j < GROUP
    peak_J = tl.full((JOIN_GROUP,), float("-inf"), tl.float32)
    sum_J = tl.zeros((JOIN_GROUP,), tl.float32)
    joined_Jd = tl.zeros((JOIN_GROUP, HEAD_DIM), tl.float32)
    for done in tl.range(0, num_pieces, JOIN_PIECES, num_stages=1):
        new_peak_J = peak_J
        for i in tl.static_range(JOIN_PIECES):
            mask = is_joined & (done + i < num_pieces)
            log_J = tl.load(weights + first + (done + i) * piece_stride + j, mask=mask, other=float("-inf"))
            new_peak_J = tl.maximum(new_peak_J, log_J)
        new_peak_J = tl.where(is_joined, new_peak_J, 0.0)
        shrink_J = tl.exp2(peak_J - new_peak_J)
        sum_J = sum_J * shrink_J
        joined_Jd = joined_Jd * shrink_J[:, None]
        for i in tl.static_range(JOIN_PIECES):
            mask = is_joined & (done + i < num_pieces)
            theirs = first + (done + i) * piece_stride + j
            weight_J = tl.exp2(tl.load(weights + theirs, mask=mask, other=float("-inf")) - new_peak_J)
            part_at = parts + theirs[:, None].to(tl.int64) * HEAD_DIM + dims[None, :]
            sum_J += weight_J
            joined_Jd += tl.load(part_at, mask=mask[:, None], other=0.0) * weight_J[:, None]
        peak_J = new_peak_J
    at = out_at + j[:, None] * HEAD_DIM + dims[None, :]
    tl.store(at, (joined_Jd / sum_J[:, None]).to(out_at.dtype.element_ty), mask=is_joined[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_shares", "chunk_tokens", "rotations_stride", "rotates", "tempers"])
def decode_kernel(
    q, pages, table, seats, positions, out, parts, weights, num_finished, write_slots, rotations, temperatures,
    q_stride, page_stride, slot_stride, table_stride, table_width, out_stride, rotations_stride,
    num_rows, num_shares, chunk_tokens, rotates, tempers, scale, eps,
    PAGE_TOKENS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, LEAST_TILES: tl.constexpr, ROWS_BLOCK: tl.constexpr,
    FEW: tl.constexpr, JOIN_GROUP: tl.constexpr, JOIN_PIECES: tl.constexpr, PRECISION: tl.constexpr,
    STORES: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """STORES: `q` has rows of queries, keys and values as a projection left them; they are made ready here, and those
    of a row's newest token stored by its last piece. Else they are ready, and the newest key is in the cache.
    """
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)

    # Rows have one piece after another. Pieces are whole tiles, and a row's differ by one at most.
    r = tl.arange(0, ROWS_BLOCK)
    is_row = r < num_rows
    positions_R = tl.load(positions + r, mask=is_row, other=0).to(tl.int32)
    if FEW:
        seats_R = tl.load(seats + r, mask=is_row, other=-1)
    last_R = tl.maximum(positions_R, 0)
    if chunk_tokens > 0:
        last_R = last_R % chunk_tokens
    tiles_R = tl.where(is_row, last_R // KEYS + 1, 0)
    share = tl.maximum(tl.cdiv(tl.sum(tiles_R, axis=0), num_shares), LEAST_TILES)
    pieces_R = (tiles_R + share - 1) // share
    ends_R = tl.cumsum(pieces_R, axis=0)
    row = tl.sum((is_row & (ends_R <= piece)).to(tl.int32), axis=0)
    if row >= num_rows:
        return
    first_piece = tl.sum(tl.where(r < row, pieces_R, 0), axis=0)

    g = tl.arange(0, GROUP_BLOCK)
    dims = tl.arange(0, HEAD_DIM)
    is_query = (g < GROUP)[:, None]
    out_row = out + row.to(tl.int64) * out_stride + kv_head * GROUP * HEAD_DIM
    out_at = out_row + g[:, None] * HEAD_DIM + dims[None, :]
    if FEW:
        position = tl.sum(tl.where(r == row, positions_R, 0), axis=0)
        seat = tl.sum(tl.where(r == row, seats_R, 0), axis=0)
    else:
        position = tl.load(positions + row).to(tl.int32)
        seat = tl.load(seats + row)
    position = tl.maximum(position, 0)
    start = 0
    if chunk_tokens > 0:
        start = position - position % chunk_tokens
    num_keys = position + 1 - start
    num_tiles = tl.cdiv(num_keys, KEYS)
    num_pieces = tl.cdiv(num_tiles, share)
    low = (piece - first_piece) * num_tiles // num_pieces * KEYS
    high = tl.minimum((piece - first_piece + 1) * num_tiles // num_pieces * KEYS, num_keys)
    if STORES:
        high = tl.minimum(high, num_keys - 1)
    table_row = table + tl.maximum(seat, 0).to(tl.int64) * table_stride
    first_column = (start // PAGE_TOKENS) % table_width
    keys = pages + kv_head * HEAD_DIM
    values_offset = NUM_KV_HEADS * HEAD_DIM
    lane = tl.arange(0, KEYS)
    page_N = _pages_of(table_row, low + lane, high, first_column, table_width, PAGE_TOKENS)
    await_inputs()
    q_row = q + row.to(tl.int64) * q_stride
    if STORES:
        head = tl.where(g < GROUP, kv_head * GROUP + g, NUM_KV_HEADS * GROUP + kv_head)
        q_at = q_row + head[:, None] * HEAD_DIM + dims[None, :]
        q_Gd = tl.load(q_at, mask=(g <= GROUP)[:, None], other=0.0)
        value_d = tl.load(q_row + (NUM_KV_HEADS * (GROUP + 1) + kv_head) * HEAD_DIM + dims)
        slot = tl.load(write_slots + row)
    else:
        q_Gd = tl.load(q_row + (kv_head * GROUP + g)[:, None] * HEAD_DIM + dims[None, :], mask=is_query, other=0.0)
    if seat < 0:
        if piece == first_piece:
            tl.store(out_at, tl.zeros((GROUP_BLOCK, HEAD_DIM), out.dtype.element_ty), mask=is_query)
        return
    peak_G = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    sum_G = tl.zeros((GROUP_BLOCK,), tl.float32)
    sum_Gd = tl.zeros((GROUP_BLOCK, HEAD_DIM), tl.float32)
    if STORES:
        # The newest token's key and value are here: its row's last piece begins with them, and stores them.
        if rotates != 0:
            q_Gd = turned(q_Gd, rotations + row.to(tl.int64) * rotations_stride, eps, GROUP_BLOCK, HEAD_DIM, NORMS)
        if tempers != 0:
            warm_Gd = q_Gd.to(tl.float32) * tl.load(temperatures + row)
            q_Gd = tl.where(is_query, warm_Gd.to(q_Gd.dtype), q_Gd)
        is_last = piece - first_piece == num_pieces - 1
        key_d = as_kept(tl.sum(tl.where((g == GROUP)[:, None], q_Gd.to(tl.float32), 0.0), axis=0), pages)
        kept_d = as_kept(value_d.to(tl.float32), pages)
        place = keys + (slot // PAGE_TOKENS) * page_stride + (slot % PAGE_TOKENS) * slot_stride + dims
        is_written = is_last & (slot >= 0) & (dims >= 0)
        tl.store(place, key_d, mask=is_written)
        tl.store(place + values_offset, kept_d, mask=is_written)
        key_d, kept_d = key_d.to(q_Gd.dtype).to(tl.float32), kept_d.to(q_Gd.dtype).to(tl.float32)
        score_G = tl.sum(q_Gd.to(tl.float32) * key_d[None, :], axis=1) * scale
        peak_G = tl.where(is_last, score_G, peak_G)
        sum_G = tl.where(is_last, 1.0, sum_G)
        sum_Gd += tl.where(is_last, kept_d, 0.0)[None, :]
    for tile in range(low, high, KEYS):
        n = tile + lane
        is_key = n < high
        at = keys + page_N * page_stride + (n % PAGE_TOKENS) * slot_stride
        k_Nd = tl.load(at[:, None] + dims[None, :], mask=is_key[:, None], other=0.0).to(q_Gd.dtype)
        # Masked, for what a page's last owner left may not be finite, and 0 * NaN is NaN.
        v_Nd = tl.load(at[:, None] + values_offset + dims[None, :], mask=is_key[:, None], other=0.0)
        # A tile ahead, so that the loads of keys and values never wait for one another's addresses.
        page_N = _pages_of(table_row, n + KEYS, high, first_column, table_width, PAGE_TOKENS)
        scores_GN = tl.dot(q_Gd, tl.trans(k_Nd), input_precision=PRECISION) * scale
        scores_GN = tl.where(is_key[None, :], scores_GN, float("-inf"))
        new_peak_G = tl.maximum(peak_G, tl.max(scores_GN, axis=1))
        shrink_G = tl.exp2(peak_G - new_peak_G)
        share_GN = tl.exp2(scores_GN - new_peak_G[:, None])
        sum_G = sum_G * shrink_G + tl.sum(share_GN, axis=1)
        sum_Gd = tl.dot(
            share_GN.to(q_Gd.dtype), v_Nd.to(q_Gd.dtype), sum_Gd * shrink_G[:, None], input_precision=PRECISION
        )
        peak_G = new_peak_G

    found_Gd = sum_Gd / sum_G[:, None]
    if num_pieces == 1:
        tl.store(out_at, found_Gd.to(out.dtype.element_ty), mask=is_query)
        return
    # What this program found, and its weight in base-2 logarithm, for the last of the row's programs to join.
    mine = (piece * NUM_KV_HEADS + kv_head) * GROUP + g
    tl.store(weights + mine, peak_G + tl.log2(sum_G), mask=g < GROUP)
    tl.store(parts + mine[:, None].to(tl.int64) * HEAD_DIM + dims[None, :], found_Gd, mask=is_query)
    tl.debug_barrier()
    counter = num_finished + row * NUM_KV_HEADS + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") == num_pieces - 1:
        tl.store(counter, 0)
        first = (first_piece * NUM_KV_HEADS + kv_head) * GROUP
        stride = NUM_KV_HEADS * GROUP
        if STORES:
            _join(out_row, parts, weights, first, num_pieces, stride, GROUP, HEAD_DIM, JOIN_GROUP, JOIN_PIECES)
        else:
            _join_at_once(out_row, parts, weights, first, num_pieces, stride, GROUP, HEAD_DIM, JOIN_GROUP, JOIN_PIECES)
