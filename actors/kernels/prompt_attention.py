"""Attention of pieces of prompts over paged keys and values, with all lengths on the device.

Owns how a step's rows are read in tiles. The grid follows from the number of rows alone, so that a captured graph
serves every prompt. Knows nothing of weights, nor of who granted the pages. Rows of one token each are
`decode_attention.py`'s.
"""

import math

import torch
from torch import Tensor

from actors.kernels.decode_attention import PagedContext, attend_row_by_row
from actors.kernels.heads import Heads
from actors.kernels.triton_here import HAS_TRITON

TILE_ROWS = 24
"""Of one program, with all queries of a kv head: 120 of 128 in Llama 4. Pieces begin at multiples of it.

On an H200 in bf16 (40 heads, 8 kv heads; 4 x 512 and 2 x 1,024 tokens) 78 and 114 us; with 16 rows 92 and 145. With
three loads in flight or 128 keys no faster, with 4 warps slower.
"""

_LOG2_E = 1.4426950408889634


def prompt_attention(q_THd: Tensor, pages_PSHd: Tensor, context: PagedContext, heads: Heads, out_TA: Tensor) -> None:
    """softmax(q k / sqrt(d)) v of the rows of prompts, into their rows of `out_TA`: [T, Hq * head_dim] of q's dtype.

    q_THd: [T, Hq, head_dim], rows may be strided, heads may not. pages_PSHd: [P, page_tokens, 2 Hkv, head_dim], keys
    first, of q's dtype or float8_e4m3fn (scale 1). head_dim is a power of two of at least 16. A piece's
    rows lie one after another from a multiple of TILE_ROWS on, as their positions (int64) do, and do not go beyond the
    end of a chunk; their own keys are in the cache already.
    """
    if q_THd.is_cuda and HAS_TRITON:
        _with_triton(q_THd, pages_PSHd, context, heads, out_TA)
    else:
        attend_row_by_row(q_THd, pages_PSHd, context, heads, out_TA)


def _with_triton(q_THd: Tensor, pages_PSHd: Tensor, context: PagedContext, heads: Heads, out_TA: Tensor) -> None:
    import triton

    from actors.kernels.prompt_attention_triton import prompt_kernel

    num_tiles = triton.cdiv(q_THd.shape[0], TILE_ROWS)
    if not num_tiles:
        return
    queries_block = max(16, triton.next_power_of_2(TILE_ROWS * heads.queries_per_kv))
    is_fp32, table_SW = q_THd.dtype == torch.float32, context.table.pages_SW
    prompt_kernel[(heads.num_kv_heads, num_tiles)](
        q_THd, pages_PSHd, table_SW, context.seats_B, context.positions_B, out_TA, q_THd.stride(0),
        pages_PSHd.stride(0), pages_PSHd.stride(1), table_SW.stride(0), table_SW.shape[1], out_TA.stride(0),
        q_THd.shape[0], context.chunk_tokens, _LOG2_E / math.sqrt(heads.head_dim),
        PAGE_TOKENS=context.table.page_tokens, NUM_KV_HEADS=heads.num_kv_heads, GROUP=heads.queries_per_kv,
        TILE_ROWS=TILE_ROWS, QUERIES=queries_block, HEAD_DIM=heads.head_dim, KEYS=32 if is_fp32 else 64,
        PRECISION="ieee" if is_fp32 else "tf32", num_warps=8 if queries_block >= 128 else 4, num_stages=2,
    )  # fmt: skip
