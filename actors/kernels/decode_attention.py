"""Attention of one token per request over paged keys and values, with all lengths on the device.

Owns how a context is split among programs and joined again. The grid follows from the number of rows alone, so that a
captured graph serves every length. Knows nothing of weights, nor of who granted the pages.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.kernels.decode_inputs import PageTable
from actors.kernels.heads import Heads
from actors.kernels.triton_here import HAS_TRITON, tl, triton

MAX_SPLITS = 64
PROGRAMS_PER_SM = 4
FULL_SPLITS = 8  # however many rows there are: one long context among short ones should not be one program's work
FULL_KEYS = 512  # keys that are worth a program of their own where rows alone fill the device
_FEW_SPLITS = 16  # two compiled forms: rows of at most this many, and of at most MAX_SPLITS
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """At most `count` programs share a row's keys of one kv head; no one of them gets fewer than `least_keys`."""

    count: int
    least_keys: int


def plan_splits(num_rows: int, num_kv_heads: int, num_sms: int) -> SplitPlan:
    """Enough programs to fill the device, by the number of rows alone."""
    wanted = -(-PROGRAMS_PER_SM * num_sms // max(1, num_rows * num_kv_heads))
    if wanted < FULL_SPLITS:
        return SplitPlan(count=FULL_SPLITS, least_keys=FULL_KEYS)
    return SplitPlan(count=min(MAX_SPLITS, wanted), least_keys=1)


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

    The counters are zero between launches. Launches that may overlap need a scratch each.
    """

    def __init__(self, heads: Heads, max_rows: int, device: torch.device) -> None:
        self.num_sms = _num_sms(device)
        partials = max(
            num_rows * plan_splits(num_rows, heads.num_kv_heads, self.num_sms).count
            for num_rows in range(1, max_rows + 1)
        )
        partials *= heads.num_heads
        self.sums = torch.empty(partials * heads.head_dim, dtype=torch.float32, device=device)
        self.peaks = torch.empty(partials * 2, dtype=torch.float32, device=device)
        self.num_finished = torch.zeros(max_rows * heads.num_kv_heads, dtype=torch.int32, device=device)


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
    """Launch shape of a program: keys per iteration, warps, and loads in flight."""

    keys: int
    warps: int
    stages: int


def choose_tile(head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> Tile:
    """Fixed by measurement, never tuned while serving."""
    if dtype == torch.float32:
        return Tile(keys=32, warps=4, stages=2)
    return Tile(keys=64, warps=4, stages=4 if cache_dtype.itemsize == 1 else 3)


if HAS_TRITON:
    # One compiled form for all numbers of rows and both groups of layers.
    @triton.jit(do_not_specialize=["chunk_tokens", "splits", "least_tiles"])  # type: ignore[untyped-decorator]
    def _decode_kernel(  # type: ignore[no-untyped-def]
        q, pages, table, seats, positions, out, sums, peaks, num_finished,
        q_stride, page_stride, slot_stride, table_stride, table_width, out_stride, chunk_tokens, splits, least_tiles,
        scale,
        PAGE_TOKENS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr,
        HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, SPLITS_BLOCK: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One program per kv head, split and row. Names: G queries of a kv head, N keys, S splits."""
        kv_head = tl.program_id(0)
        split = tl.program_id(1)
        row = tl.program_id(2)
        g = tl.arange(0, GROUP_BLOCK)
        dims = tl.arange(0, HEAD_DIM)
        is_query = (g < GROUP)[:, None]
        out_at = out + row.to(tl.int64) * out_stride + (kv_head * GROUP + g)[:, None] * HEAD_DIM + dims[None, :]
        seat = tl.load(seats + row)
        if seat < 0:
            if split == 0:
                tl.store(out_at, tl.zeros((GROUP_BLOCK, HEAD_DIM), out.dtype.element_ty), mask=is_query)
            return

        # Shares are whole tiles, equal but for the last.
        position = tl.load(positions + row).to(tl.int32)
        start = 0
        if chunk_tokens > 0:
            start = position - position % chunk_tokens
        num_keys = position + 1 - start
        num_tiles = tl.cdiv(num_keys, KEYS)
        share = tl.maximum(tl.cdiv(num_tiles, splits), least_tiles)
        num_active = tl.cdiv(num_tiles, share)
        if split >= num_active:
            return
        low = split * share * KEYS
        high = tl.minimum(low + share * KEYS, num_keys)

        q_at = q + row.to(tl.int64) * q_stride + (kv_head * GROUP + g)[:, None] * HEAD_DIM + dims[None, :]
        q_Gd = tl.load(q_at, mask=is_query, other=0.0)
        table_row = table + seat.to(tl.int64) * table_stride
        first_column = (start // PAGE_TOKENS) % table_width
        keys = pages + kv_head * HEAD_DIM
        values_offset = NUM_KV_HEADS * HEAD_DIM
        peak_G = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
        sum_G = tl.zeros((GROUP_BLOCK,), tl.float32)
        sum_Gd = tl.zeros((GROUP_BLOCK, HEAD_DIM), tl.float32)
        for tile in range(low, high, KEYS):
            n = tile + tl.arange(0, KEYS)
            is_key = n < high
            column = first_column + n // PAGE_TOKENS
            column = tl.where(column >= table_width, column - table_width, column)
            page = tl.load(table_row + column, mask=is_key, other=0)
            at = keys + page.to(tl.int64) * page_stride + (n % PAGE_TOKENS) * slot_stride
            k_Nd = tl.load(at[:, None] + dims[None, :], mask=is_key[:, None], other=0.0).to(q_Gd.dtype)
            scores_GN = tl.dot(q_Gd, tl.trans(k_Nd), input_precision=PRECISION) * scale
            scores_GN = tl.where(is_key[None, :], scores_GN, float("-inf"))
            new_peak_G = tl.maximum(peak_G, tl.max(scores_GN, axis=1))
            shrink_G = tl.exp2(peak_G - new_peak_G)
            share_GN = tl.exp2(scores_GN - new_peak_G[:, None])
            # Masked, for what a page's last owner left may not be finite, and 0 * NaN is NaN.
            v_Nd = tl.load(at[:, None] + values_offset + dims[None, :], mask=is_key[:, None], other=0.0)
            sum_G = sum_G * shrink_G + tl.sum(share_GN, axis=1)
            sum_Gd = tl.dot(
                share_GN.to(q_Gd.dtype), v_Nd.to(q_Gd.dtype), sum_Gd * shrink_G[:, None], input_precision=PRECISION
            )
            peak_G = new_peak_G

        if num_active == 1:
            tl.store(out_at, (sum_Gd / sum_G[:, None]).to(out.dtype.element_ty), mask=is_query)
            return
        # What this program found, for the last of the row's programs to join.
        pair = (row * NUM_KV_HEADS + kv_head).to(tl.int64)
        first = pair * splits * GROUP
        mine = first + split * GROUP + g
        tl.store(peaks + 2 * mine, peak_G, mask=g < GROUP)
        tl.store(peaks + 2 * mine + 1, sum_G, mask=g < GROUP)
        tl.store(sums + mine[:, None] * HEAD_DIM + dims[None, :], sum_Gd, mask=is_query)
        tl.debug_barrier()
        num_before = tl.atomic_add(num_finished + pair, 1, sem="acq_rel")
        if num_before == num_active - 1:
            tl.store(num_finished + pair, 0)
            s = tl.arange(0, SPLITS_BLOCK)
            is_there = s < num_active
            for i in tl.static_range(GROUP):
                theirs = first + s * GROUP + i
                peak_S = tl.load(peaks + 2 * theirs, mask=is_there, other=float("-inf"))
                weight_S = tl.exp2(peak_S - tl.max(peak_S, axis=0))
                total = tl.sum(weight_S * tl.load(peaks + 2 * theirs + 1, mask=is_there, other=0.0), axis=0)
                sum_Sd = tl.load(sums + theirs[:, None] * HEAD_DIM + dims[None, :], mask=is_there[:, None], other=0.0)
                joined_d = tl.sum(sum_Sd * weight_S[:, None], axis=0) / total
                joined_at = out + row.to(tl.int64) * out_stride + (kv_head * GROUP + i) * HEAD_DIM + dims
                tl.store(joined_at, joined_d.to(out.dtype.element_ty))


def _with_triton(
    q_BHd: Tensor,
    pages_PSHd: Tensor,
    context: DecodeContext,
    heads: Heads,
    scratch: DecodeScratch,
    tile: Tile | None = None,
    splits: SplitPlan | None = None,
) -> Tensor:
    num_rows = q_BHd.shape[0]
    out_BA = torch.empty((num_rows, heads.num_heads * heads.head_dim), dtype=q_BHd.dtype, device=q_BHd.device)
    if not num_rows:
        return out_BA
    if tile is None:
        tile = choose_tile(heads.head_dim, q_BHd.dtype, pages_PSHd.dtype)
    if splits is None:
        splits = plan_splits(num_rows, heads.num_kv_heads, scratch.num_sms)
    table_SW = context.table.pages_SW
    _decode_kernel[(heads.num_kv_heads, splits.count, num_rows)](
        q_BHd, pages_PSHd, table_SW, context.seats_B, context.positions_B, out_BA,
        scratch.sums, scratch.peaks, scratch.num_finished,
        q_BHd.stride(0), pages_PSHd.stride(0), pages_PSHd.stride(1), table_SW.stride(0), table_SW.shape[1],
        out_BA.stride(0), context.chunk_tokens, splits.count, -(-splits.least_keys // tile.keys),
        _LOG2_E / math.sqrt(heads.head_dim),
        PAGE_TOKENS=context.table.page_tokens, NUM_KV_HEADS=heads.num_kv_heads, GROUP=heads.queries_per_kv,
        GROUP_BLOCK=max(16, triton.next_power_of_2(heads.queries_per_kv)), HEAD_DIM=heads.head_dim,
        KEYS=tile.keys, SPLITS_BLOCK=_FEW_SPLITS if splits.count <= _FEW_SPLITS else MAX_SPLITS,
        PRECISION="ieee" if q_BHd.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_BA
