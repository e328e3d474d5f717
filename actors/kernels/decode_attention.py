"""Attention of one token per request over paged keys and values, with all lengths on the device.

Owns how contexts are split among programs and joined again. The grid follows from the number of rows alone, and every
program finds its own work from all rows' lengths, so that a captured graph serves every length. Knows nothing of
weights, nor of who granted the pages.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.kernels.decode_inputs import PageTable
from actors.kernels.heads import Heads
from actors.kernels.triton_here import HAS_TRITON, tl, triton

LEAST_KEYS = 128  # that are worth a program of their own
_ROW_BLOCKS = (16, 256, 1024)  # compiled forms: rows whose lengths every program reads, to find its own work
MAX_ROWS = _ROW_BLOCKS[-1]
_JOINED_VALUES = 8192  # read at once by a program that joins
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeContext:
    """What each of B queries sees: its own position and those before it, of its chunk where layers are chunked.

    `seats_B` (int32; -1: padding) are rows of the page table, `positions_B` (int32 or int64) the queries' positions,
    whose own keys are in the cache already. `chunk_tokens` 0: everything so far. The table is at least as wide as the
    pages that a query sees; one that is as wide as a chunk may be a ring.
    """

    seats_B: Tensor
    positions_B: Tensor
    table: PageTable
    chunk_tokens: int


class DecodeScratch:
    """What the programs of a row leave for the one that joins them; shared by all layers, one launch after another.

    All rows' keys are dealt in about equal shares for each kv head, but none of several rows: at most
    `num_shares() + max_rows` pieces. The counters are zero between launches. Launches that may overlap need a scratch
    each. At most 1024 rows.
    """

    def __init__(self, heads: Heads, max_rows: int, device: torch.device, fixed_shares: int | None = None) -> None:
        """`fixed_shares`: for every launch, instead of what its tile says."""
        self._fixed_shares = fixed_shares
        self._sms_per_head = _num_sms(device) / heads.num_kv_heads
        most_shares = max(self.num_shares(per_sm) for per_sm in range(1, MOST_PER_SM + 1))
        num_parts = (most_shares + max_rows) * heads.num_heads
        self.parts = torch.empty(num_parts * heads.head_dim, dtype=torch.float32, device=device)
        self.weights = torch.empty(num_parts, dtype=torch.float32, device=device)
        self.num_finished = torch.zeros(max_rows * heads.num_kv_heads, dtype=torch.int32, device=device)

    def num_shares(self, per_sm: int) -> int:
        """Of one kv head, where all heads together have `per_sm` for each multiprocessor."""
        if self._fixed_shares is not None:
            return self._fixed_shares
        return max(1, int(per_sm * self._sms_per_head))


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def decode_attention(
    q_BHd: Tensor, pages_PSHd: Tensor, context: DecodeContext, heads: Heads, scratch: DecodeScratch
) -> Tensor:
    """softmax(q k / sqrt(d)) v: [B, Hq * head_dim] in q's dtype; zeros in padding rows.

    q_BHd: [B, Hq, head_dim], rows may be strided, heads may not. pages_PSHd: [P, page_tokens, 2 Hkv, head_dim], keys
    first, of q's dtype or float8_e4m3fn (scale 1). B is at most the scratch's `max_rows`. head_dim is a power of two
    of at least 16.
    """
    if q_BHd.is_cuda and HAS_TRITON:
        return _with_triton(q_BHd, pages_PSHd, context, heads, scratch)
    return _with_torch(q_BHd, pages_PSHd, context, heads)


def _with_torch(q_BHd: Tensor, pages_PSHd: Tensor, context: DecodeContext, heads: Heads) -> Tensor:
    """Row by row: what the kernel is compared with."""
    out_BHd = torch.zeros(q_BHd.shape, dtype=q_BHd.dtype, device=q_BHd.device)
    page_tokens, width = context.table.page_tokens, context.table.pages_SW.shape[1]
    for row, (seat, position) in enumerate(zip(context.seats_B.tolist(), context.positions_B.tolist(), strict=True)):
        if seat < 0:
            continue
        start = position - position % context.chunk_tokens if context.chunk_tokens else 0
        numbers_N = torch.arange(start // page_tokens, position // page_tokens + 1, device=q_BHd.device)
        ids_N = context.table.pages_SW[seat].index_select(0, numbers_N % width)
        kv_LHd = pages_PSHd[ids_N.long()].flatten(0, 1)[: position + 1 - start].to(q_BHd.dtype)
        k_HLd, v_HLd = kv_LHd.transpose(0, 1).split(heads.num_kv_heads)
        q_KGd = q_BHd[row].view(heads.num_kv_heads, -1, heads.head_dim)
        out_BHd[row] = F.scaled_dot_product_attention(q_KGd, k_HLd, v_HLd).flatten(0, 1)
    return out_BHd.flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Launch shape: keys per iteration of a program, its warps and loads in flight, and shares per multiprocessor."""

    keys: int
    warps: int
    stages: int
    per_sm: int = 2


# By rows times kv heads. On an H200 in bf16, head_dim 128, contexts of 1,024, each line took so many microseconds where
# it is chosen, and Tile(keys=64, warps=4, stages=3) those in brackets.
_TILES = (
    (128, Tile(keys=64, warps=2, stages=3)),  # 8 kv heads: 1 row 10.4 (11.2), 8: 17.6 (20.2); 2: 32 rows 18.1 (21.0)
    (384, Tile(keys=64, warps=8, stages=3)),  # 8 kv heads: 32 rows 39.6 (43.2), and of 2,048 tokens 71.0 (76.8)
    (768, Tile(keys=128, warps=4, stages=2, per_sm=3)),  # 2 kv heads: 256 rows 75.2 (87.2)
    (1 << 62, Tile(keys=64, warps=4, stages=3, per_sm=3)),  # 8 kv heads: 128 rows 140.2 (140.8), 256: 266.2 (268.5)
)
MOST_PER_SM = max(tile.per_sm for _, tile in _TILES)


def choose_tile(num_rows: int, heads: Heads, dtype: torch.dtype, cache_dtype: torch.dtype) -> Tile:
    """Fixed by measurement, never tuned while serving."""
    if dtype == torch.float32:
        return Tile(keys=32, warps=4, stages=2)
    if cache_dtype.itemsize == 1:
        return Tile(keys=64, warps=4, stages=4)
    return next(tile for most, tile in _TILES if num_rows * heads.num_kv_heads <= most)


if HAS_TRITON:

    @triton.jit  # type: ignore[untyped-decorator]
    def _pages_of(table_row, n, high, first_column, table_width, PAGE_TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
        column = first_column + n // PAGE_TOKENS
        column = tl.where(column >= table_width, column - table_width, column)
        return tl.load(table_row + column, mask=n < high, other=0).to(tl.int64)

    @triton.jit(do_not_specialize=["num_rows", "num_shares", "chunk_tokens"])  # type: ignore[untyped-decorator]
    def _decode_kernel(  # type: ignore[no-untyped-def]
        q, pages, table, seats, positions, out, parts, weights, num_finished,
        q_stride, page_stride, slot_stride, table_stride, table_width, out_stride,
        num_rows, num_shares, chunk_tokens, scale,
        PAGE_TOKENS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr,
        HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, LEAST_TILES: tl.constexpr, ROWS_BLOCK: tl.constexpr,
        JOIN_GROUP: tl.constexpr, JOIN_PIECES: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One program per kv head and piece. Names: R rows, G queries of a kv head, N keys, S pieces of a row."""
        kv_head = tl.program_id(0)
        piece = tl.program_id(1)

        # Rows have one piece after another. Pieces are whole tiles, and a row's differ by one at most.
        r = tl.arange(0, ROWS_BLOCK)
        is_row = r < num_rows
        last_R = tl.maximum(tl.load(positions + r, mask=is_row, other=0).to(tl.int32), 0)
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
        out_at = out + row.to(tl.int64) * out_stride + (kv_head * GROUP + g)[:, None] * HEAD_DIM + dims[None, :]
        position = tl.load(positions + row).to(tl.int32)
        seat = tl.load(seats + row)
        q_at = q + row.to(tl.int64) * q_stride + (kv_head * GROUP + g)[:, None] * HEAD_DIM + dims[None, :]
        q_Gd = tl.load(q_at, mask=is_query, other=0.0)
        if seat < 0:
            if piece == first_piece:
                tl.store(out_at, tl.zeros((GROUP_BLOCK, HEAD_DIM), out.dtype.element_ty), mask=is_query)
            return
        start = 0
        if chunk_tokens > 0:
            start = position - position % chunk_tokens
        num_keys = position + 1 - start
        num_tiles = tl.cdiv(num_keys, KEYS)
        num_pieces = tl.cdiv(num_tiles, share)
        low = (piece - first_piece) * num_tiles // num_pieces * KEYS
        high = tl.minimum((piece - first_piece + 1) * num_tiles // num_pieces * KEYS, num_keys)

        table_row = table + seat.to(tl.int64) * table_stride
        first_column = (start // PAGE_TOKENS) % table_width
        keys = pages + kv_head * HEAD_DIM
        values_offset = NUM_KV_HEADS * HEAD_DIM
        lane = tl.arange(0, KEYS)
        peak_G = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
        sum_G = tl.zeros((GROUP_BLOCK,), tl.float32)
        sum_Gd = tl.zeros((GROUP_BLOCK, HEAD_DIM), tl.float32)
        page_N = _pages_of(table_row, low + lane, high, first_column, table_width, PAGE_TOKENS)
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
            j = tl.arange(0, JOIN_GROUP)
            is_joined = j < GROUP
            peak_J = tl.full((JOIN_GROUP,), float("-inf"), tl.float32)
            sum_J = tl.zeros((JOIN_GROUP,), tl.float32)
            joined_Jd = tl.zeros((JOIN_GROUP, HEAD_DIM), tl.float32)
            for done in tl.range(0, num_pieces, JOIN_PIECES, num_stages=1):
                s = done + tl.arange(0, JOIN_PIECES)
                is_there = (s < num_pieces)[:, None]
                theirs = ((first_piece + s)[:, None] * NUM_KV_HEADS + kv_head) * GROUP + j[None, :]
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
            joined_at = out + row.to(tl.int64) * out_stride + (kv_head * GROUP + j)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(joined_at, (joined_Jd / sum_J[:, None]).to(out.dtype.element_ty), mask=is_joined[:, None])


def _with_triton(
    q_BHd: Tensor,
    pages_PSHd: Tensor,
    context: DecodeContext,
    heads: Heads,
    scratch: DecodeScratch,
    tile: Tile | None = None,
    least_keys: int = LEAST_KEYS,
) -> Tensor:
    num_rows = q_BHd.shape[0]
    out_BA = torch.empty((num_rows, heads.num_heads * heads.head_dim), dtype=q_BHd.dtype, device=q_BHd.device)
    if not num_rows:
        return out_BA
    if tile is None:
        tile = choose_tile(num_rows, heads, q_BHd.dtype, pages_PSHd.dtype)
    num_shares = scratch.num_shares(tile.per_sm)
    table_SW = context.table.pages_SW
    join_group = triton.next_power_of_2(heads.queries_per_kv)
    _decode_kernel[(heads.num_kv_heads, num_shares + num_rows)](
        q_BHd, pages_PSHd, table_SW, context.seats_B, context.positions_B, out_BA,
        scratch.parts, scratch.weights, scratch.num_finished,
        q_BHd.stride(0), pages_PSHd.stride(0), pages_PSHd.stride(1), table_SW.stride(0), table_SW.shape[1],
        out_BA.stride(0), num_rows, num_shares, context.chunk_tokens, _LOG2_E / math.sqrt(heads.head_dim),
        PAGE_TOKENS=context.table.page_tokens, NUM_KV_HEADS=heads.num_kv_heads, GROUP=heads.queries_per_kv,
        GROUP_BLOCK=max(16, join_group), HEAD_DIM=heads.head_dim, KEYS=tile.keys,
        LEAST_TILES=max(1, least_keys // tile.keys),
        ROWS_BLOCK=next(block for block in _ROW_BLOCKS if block >= num_rows),
        JOIN_GROUP=join_group, JOIN_PIECES=max(2, _JOINED_VALUES // (join_group * heads.head_dim)),
        PRECISION="ieee" if q_BHd.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_BA
