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

from actors.kernels.heads import Heads, store_heads
from actors.kernels.step_inputs import PageTable
from actors.kernels.triton_here import HAS_TRITON

MOST_FUSED = 96  # rows times kv heads of `store_and_attend` in one launch; from about there on two take less time
_ROW_BLOCKS = (16, 256, 1024)  # compiled forms: rows whose lengths every program reads, to find its own work
_FEW_ROWS = 16  # whose seats are read along, before it is known which one is wanted
MAX_ROWS = _ROW_BLOCKS[-1]
_JOINED_VALUES, _JOINED_OF_THREAD = 8192, 64  # read at once by a program that joins, and by each of its threads
_MOST_UNROLLED = 8
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedContext:
    """What each of B rows sees: its own position and those before it, of its chunk where layers are chunked.

    `seats_B` (int32; -1: not a row to attend to) are rows of the page table, `positions_B` (int32 or int64)
    the queries' positions, whose own keys are in the cache already. `chunk_tokens` 0: everything so far. The table is
    at least as wide as the pages that a query sees; one that is as wide as a chunk may be a ring.
    """

    seats_B: Tensor
    positions_B: Tensor
    table: PageTable
    chunk_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewestTokens:
    """What makes ready and stores the newest token of each of B rows: as `store_heads` has it."""

    write_slots_B: Tensor
    rotations_BR2: Tensor | None
    temperatures_B: Tensor | None


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
    q_BHd: Tensor,
    pages_PSHd: Tensor,
    context: PagedContext,
    heads: Heads,
    scratch: DecodeScratch,
    out_BA: Tensor | None = None,
) -> Tensor:
    """softmax(q k / sqrt(d)) v: [B, Hq * head_dim] in q's dtype, which is `out_BA` if that is given; zeros in padding
    rows.

    q_BHd: [B, Hq, head_dim], rows may be strided, heads may not. pages_PSHd: [P, page_tokens, 2 Hkv, head_dim], keys
    first, of q's dtype or float8_e4m3fn (scale 1). B is at most the scratch's `max_rows`. head_dim is a power of two
    of at least 16.
    """
    if q_BHd.is_cuda and HAS_TRITON:
        return _with_triton(q_BHd, pages_PSHd, context, heads, scratch, out_BA=out_BA)
    found_BA = _with_torch(q_BHd, pages_PSHd, context, heads)
    return found_BA if out_BA is None else out_BA.copy_(found_BA)


def store_and_attend(
    qkv_BN: Tensor,
    pages_PSHd: Tensor,
    newest: NewestTokens,
    context: PagedContext,
    heads: Heads,
    scratch: DecodeScratch,
) -> Tensor:
    """`store_heads` and `decode_attention` of the same rows, if they are few in one launch: [B, Hq * head_dim].

    qkv_BN: [B, (Hq + 2 Hkv) * head_dim], rows contiguous; undefined afterwards. Rows write where their newest token
    lies, which `context` says, or nothing.
    """
    qkv_BHd = qkv_BN.view(qkv_BN.shape[0], -1, heads.head_dim)
    if qkv_BN.is_cuda and HAS_TRITON and qkv_BN.shape[0] * heads.num_kv_heads <= MOST_FUSED:
        return _with_triton(qkv_BHd, pages_PSHd, context, heads, scratch, newest)
    tokens_NHd = pages_PSHd.flatten(0, 1)
    store_heads(qkv_BN, tokens_NHd, newest.write_slots_B, heads, newest.rotations_BR2, newest.temperatures_B)
    return decode_attention(qkv_BHd[:, : heads.num_heads], pages_PSHd, context, heads, scratch)


def _with_torch(q_BHd: Tensor, pages_PSHd: Tensor, context: PagedContext, heads: Heads) -> Tensor:
    out_BA = torch.zeros(q_BHd.shape, dtype=q_BHd.dtype, device=q_BHd.device).flatten(1)
    attend_row_by_row(q_BHd, pages_PSHd, context, heads, out_BA)
    return out_BA


def attend_row_by_row(q_BHd: Tensor, pages_PSHd: Tensor, context: PagedContext, heads: Heads, out_BA: Tensor) -> None:
    """Into the rows that have a seat: what kernels are compared with."""
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
        out_BA[row] = F.scaled_dot_product_attention(q_KGd, k_HLd, v_HLd).flatten()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Launch shape: keys per iteration of a program, its warps and loads in flight, shares per multiprocessor, and keys
    that are worth a program of their own.
    """

    keys: int
    warps: int
    stages: int
    per_sm: int = 2
    least_keys: int = 128


# By rows times kv heads. On an H200 in bf16, head_dim 128, contexts of 1,024, each line took so many microseconds where
# it is chosen, and Tile(keys=64, warps=4, stages=3) those in brackets.
_FUSED_TILES = (
    (8, Tile(keys=64, warps=4, stages=2, least_keys=64)),  # 2 kv heads: 1 row 8.0, where two launches took 10.8
    (32, Tile(keys=128, warps=4, stages=2, per_sm=1)),  # 2 kv heads: 8 rows 9.6 (13.4)
    (MOST_FUSED, Tile(keys=64, warps=2, stages=3)),  # 2 kv heads: 32 rows 18.4 (20.2); 8 kv heads: 8 rows 17.7 (19.4)
)
_TILES = (
    (128, Tile(keys=64, warps=2, stages=3)),  # 8 kv heads: 1 row 10.4 (11.2), 8: 17.6 (20.2); 2: 32 rows 18.1 (21.0)
    (384, Tile(keys=64, warps=8, stages=3)),  # 8 kv heads: 32 rows 39.6 (43.2), and of 2,048 tokens 71.0 (76.8)
    (768, Tile(keys=128, warps=4, stages=2, per_sm=3)),  # 2 kv heads: 256 rows 75.2 (87.2)
    (1 << 62, Tile(keys=64, warps=4, stages=3, per_sm=3)),  # 8 kv heads: 128 rows 140.2 (140.8), 256: 266.2 (268.5)
)
MOST_PER_SM = max(tile.per_sm for _, tile in _FUSED_TILES + _TILES)


def choose_tile(
    num_rows: int, heads: Heads, dtype: torch.dtype, cache_dtype: torch.dtype, is_fused: bool = False
) -> Tile:
    """Fixed by measurement, never tuned while serving."""
    if dtype == torch.float32:
        return Tile(keys=32, warps=4, stages=2)
    if cache_dtype.itemsize == 1:
        return Tile(keys=64, warps=4, stages=4)
    tiles = _FUSED_TILES if is_fused else _TILES
    return next(tile for most, tile in tiles if num_rows * heads.num_kv_heads <= most)


def _with_triton(
    q_BHd: Tensor,
    pages_PSHd: Tensor,
    context: PagedContext,
    heads: Heads,
    scratch: DecodeScratch,
    newest: NewestTokens | None = None,
    tile: Tile | None = None,
    out_BA: Tensor | None = None,
) -> Tensor:
    """With `newest`, `q_BHd` has all heads of the rows' tokens, which are not ready."""
    import triton

    from actors.kernels.decode_attention_triton import decode_kernel
    from actors.kernels.early_triton import early

    num_rows = q_BHd.shape[0]
    if out_BA is None:
        out_BA = torch.empty((num_rows, heads.num_heads * heads.head_dim), dtype=q_BHd.dtype, device=q_BHd.device)
    if not num_rows:
        return out_BA
    if tile is None:
        tile = choose_tile(num_rows, heads, q_BHd.dtype, pages_PSHd.dtype, newest is not None)
    num_shares = scratch.num_shares(tile.per_sm)
    table_SW = context.table.pages_SW
    rotations = None if newest is None else newest.rotations_BR2
    temperatures = None if newest is None else newest.temperatures_B
    join_group = triton.next_power_of_2(heads.queries_per_kv)
    pieces = _JOINED_VALUES // (join_group * heads.head_dim)
    if newest is not None:  # unrolled, and so no more than the compiler does soon
        pieces = min(_MOST_UNROLLED, _JOINED_OF_THREAD * 32 * tile.warps // (join_group * heads.head_dim))
    blocks = _ROW_BLOCKS if newest is None else (1, *_ROW_BLOCKS)  # a form less to compile, where it matters less
    rows_block = next(block for block in blocks if block >= num_rows)
    decode_kernel[(heads.num_kv_heads, num_shares + num_rows)](
        q_BHd, pages_PSHd, table_SW, context.seats_B, context.positions_B, out_BA,
        scratch.parts, scratch.weights, scratch.num_finished,
        None if newest is None else newest.write_slots_B,
        scratch.weights if rotations is None else rotations,  # a pointer that is not used, where there is none
        scratch.weights if temperatures is None else temperatures,
        q_BHd.stride(0), pages_PSHd.stride(0), pages_PSHd.stride(1), table_SW.stride(0), table_SW.shape[1],
        out_BA.stride(0), 0 if rotations is None else rotations.stride(0), num_rows, num_shares, context.chunk_tokens,
        int(rotations is not None), int(rotations is None and temperatures is not None),
        _LOG2_E / math.sqrt(heads.head_dim), 0.0 if heads.qk_norm_eps is None else heads.qk_norm_eps,
        PAGE_TOKENS=context.table.page_tokens, NUM_KV_HEADS=heads.num_kv_heads, GROUP=heads.queries_per_kv,
        GROUP_BLOCK=max(16, triton.next_power_of_2(heads.queries_per_kv + 1)), HEAD_DIM=heads.head_dim, KEYS=tile.keys,
        LEAST_TILES=max(1, tile.least_keys // tile.keys), ROWS_BLOCK=rows_block, FEW=rows_block <= _FEW_ROWS,
        JOIN_GROUP=join_group, JOIN_PIECES=max(2, pieces),
        PRECISION="ieee" if q_BHd.dtype == torch.float32 else "tf32",
        STORES=newest is not None, NORMS=heads.qk_norm_eps is not None, num_warps=tile.warps, num_stages=tile.stages,
        **early(),
    )  # fmt: skip
    return out_BA
