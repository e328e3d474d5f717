"""The attention-side kernels on a GPU against slow answers and references."""

import pytest
import torch
from torch import Tensor
from unit.kernels import attention_cases as cases

from actors.kernels import decode_attention
from actors.kernels.decode_attention import DecodeScratch, PagedContext
from actors.kernels.heads import Heads
from actors.kernels.prefill_attention import PackedRuns, packed_attention, run_attention
from actors.kernels.step_inputs import PageTable

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


@pytest.mark.parametrize("num_deltas", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "width"), [(FP32, 96), (BF16, 96), (BF16, 5120), (FP16, 16384)])
@pytest.mark.parametrize("num_rows", [0, 1, 33])
def test_norm(dtype: torch.dtype, width: int, num_deltas: int, num_rows: int) -> None:
    cases.check_norm(cases.PUBLIC, CUDA, dtype, num_rows, width, num_deltas)


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("shape", [cases.TINY, cases.SCOUT, cases.SCOUT_QUARTER])
@pytest.mark.parametrize(("dtype", "cache_dtype"), [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP8)])
@pytest.mark.parametrize("num_tokens", [0, 1, 19])
def test_heads(dtype: torch.dtype, cache_dtype: torch.dtype, shape: Heads, num_tokens: int, rotates: bool) -> None:
    cases.check_heads(cases.PUBLIC, CUDA, dtype, cache_dtype, shape, num_tokens, rotates)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP8)])
@pytest.mark.parametrize("shape", [cases.TINY, cases.SCOUT_QUARTER])
@pytest.mark.parametrize(
    "case",
    [
        cases.DecodeCase(positions=(0, 37, -1, 127, 64)),
        cases.DecodeCase(positions=(200, 3), page_tokens=32),
        cases.DecodeCase(positions=(63, 64, 700, 100), chunk_tokens=64, table_width=5),
    ],
)
def test_decode(dtype: torch.dtype, cache_dtype: torch.dtype, shape: Heads, case: cases.DecodeCase) -> None:
    cases.check_decode(cases.PUBLIC, CUDA, dtype, cache_dtype, shape, case)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "shape"),
    [
        (FP32, FP32, cases.TINY),
        (FP16, FP16, cases.TINY),
        (BF16, BF16, cases.SCOUT),
        (BF16, BF16, cases.SCOUT_QUARTER),
        (BF16, FP8, cases.SCOUT_QUARTER),
    ],
)
@pytest.mark.parametrize(
    "case",
    [
        cases.DecodeCase(positions=(117,)),
        cases.DecodeCase(positions=(0, 37, -1, 127, 64)),
        cases.DecodeCase(positions=(63, 64, 700, 100), chunk_tokens=64, table_width=5),
        cases.DecodeCase(positions=(1023, 16, -1) * 9, table_width=64),
    ],
)
def test_heads_and_decode_at_once(
    dtype: torch.dtype, cache_dtype: torch.dtype, shape: Heads, case: cases.DecodeCase
) -> None:
    for rotates in (False, True):
        cases.check_store_and_attend(cases.PUBLIC, CUDA, dtype, cache_dtype, shape, case, rotates)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP8)])
@pytest.mark.parametrize("shape", [cases.TINY, cases.SCOUT_QUARTER, cases.SCOUT])
@pytest.mark.parametrize("case", [*cases.PROMPT_CASES, cases.PromptCase(pieces=((0, 512), (200, 300)), table_width=32)])
def test_prompts(dtype: torch.dtype, cache_dtype: torch.dtype, shape: Heads, case: cases.PromptCase) -> None:
    cases.check_prompts(cases.PUBLIC, CUDA, dtype, cache_dtype, shape, case)


def long_context(num_rows: int, num_tokens: int, shape: Heads, num_pages: int, far: bool) -> tuple[Tensor, PageTable]:
    """Pages of bf16 noise, the last of the pool where `far`, in random order."""
    width = -(-num_tokens // 16)
    used = torch.randperm(num_rows * width, device=CUDA) + (num_pages - num_rows * width if far else 0)
    pages_PSHd = torch.empty(num_pages, 16, 2 * shape.num_kv_heads, shape.head_dim, dtype=BF16, device=CUDA)
    pages_PSHd[used] = torch.randn(len(used), *pages_PSHd.shape[1:], dtype=BF16, device=CUDA)
    return pages_PSHd, PageTable(pages_SW=used.view(num_rows, width).int(), page_tokens=16)


@pytest.mark.parametrize("num_shares", [None, 1, 700])
def test_decode_of_long_contexts_far_into_the_pool(num_shares: int | None) -> None:
    """Offsets beyond 32 bits, rows of very different lengths, and any number of pieces."""
    shape, lengths = cases.SCOUT, [1, 64, 65, 1000, 9000, 40000]
    num_pages = (1 << 31) // (16 * 16 * 128) + len(lengths) * 2500 + 1
    pages_PSHd, table = long_context(len(lengths), max(lengths), shape, num_pages, far=True)
    context = PagedContext(
        seats_B=torch.arange(len(lengths), dtype=torch.int32, device=CUDA),
        positions_B=torch.tensor(lengths, device=CUDA) - 1,
        table=table,
        chunk_tokens=0,
    )
    q_BHd = torch.randn(len(lengths), shape.num_heads, 128, dtype=BF16, device=CUDA)
    scratch = DecodeScratch(shape, len(lengths), CUDA, num_shares)
    got_BA = decode_attention._with_triton(q_BHd, pages_PSHd, context, shape, scratch)
    expected_BA = decode_attention._with_torch(q_BHd, pages_PSHd, context, shape)
    torch.testing.assert_close(got_BA, expected_BA, rtol=2e-2, atol=4e-3)


def test_decode_graph_serves_every_length() -> None:
    shape = cases.SCOUT_QUARTER
    pages_PSHd, table = long_context(8, 4096, shape, 8 * 256, far=False)
    seats_B = torch.arange(8, dtype=torch.int32, device=CUDA)
    context = PagedContext(
        seats_B=seats_B, positions_B=torch.zeros(8, dtype=torch.int64, device=CUDA), table=table, chunk_tokens=0
    )
    q_BHd = torch.randn(8, shape.num_heads, 128, dtype=BF16, device=CUDA)
    scratch = DecodeScratch(shape, 8, CUDA)
    decode_attention.decode_attention(q_BHd, pages_PSHd, context, shape, scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_BA = decode_attention.decode_attention(q_BHd, pages_PSHd, context, shape, scratch)
    steps = [
        ([4095, 0, 17, 900, 63, 64, 65, 2000], list(range(8))),
        ([5, 6, 0, 0, 0, 0, 0, 0], [7, 3] + 6 * [-1]),
    ]
    for positions, seats in steps:
        context.positions_B.copy_(torch.tensor(positions))
        seats_B.copy_(torch.tensor(seats))
        graph.replay()
        expected_BA = decode_attention._with_torch(q_BHd, pages_PSHd, context, shape)
        torch.testing.assert_close(out_BA, expected_BA, rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize("num_rows", [100, 300, 500])  # each has a tile of its own
def test_decode_of_many_rows_of_random_lengths(num_rows: int) -> None:
    """Every row is somebody's, whatever the lengths: the numbers of programs and of pieces are not those of a plan."""
    shape = cases.SCOUT_QUARTER
    pages_PSHd, table = long_context(num_rows, 256, shape, num_rows * 16, far=False)
    lengths_B = torch.randint(1, 257, (num_rows,), device=CUDA)
    lengths_B[7] = 1
    seats_B = torch.arange(num_rows, dtype=torch.int32, device=CUDA)
    seats_B[::9] = -1
    context = PagedContext(seats_B=seats_B, positions_B=lengths_B - 1, table=table, chunk_tokens=0)
    q_BHd = torch.randn(num_rows, shape.num_heads, 128, dtype=BF16, device=CUDA)
    scratch = DecodeScratch(shape, num_rows, CUDA)
    for _ in range(3):
        got_BA = decode_attention.decode_attention(q_BHd, pages_PSHd, context, shape, scratch)
        expected_BA = decode_attention._with_torch(q_BHd, pages_PSHd, context, shape)
        torch.testing.assert_close(got_BA, expected_BA, rtol=2e-2, atol=4e-3)


def dense_attention(q_QHd: Tensor, k_NHd: Tensor, v_NHd: Tensor) -> Tensor:
    """In double precision, with an explicit mask: the last query sees all keys."""
    queries_per_kv = q_QHd.shape[1] // k_NHd.shape[1]
    k_NHd, v_NHd = (x_NHd.double().repeat_interleave(queries_per_kv, 1) for x_NHd in (k_NHd, v_NHd))
    scores_HQN = torch.einsum("qhd,nhd->hqn", q_QHd.double(), k_NHd) / q_QHd.shape[2] ** 0.5
    sees_QN = torch.ones(scores_HQN.shape[1:], dtype=torch.bool, device=CUDA).tril(len(k_NHd) - len(q_QHd))
    shares_HQN = scores_HQN.masked_fill(~sees_QN, float("-inf")).softmax(-1)
    return torch.einsum("hqn,nhd->qhd", shares_HQN, v_NHd).flatten(1)


def packed(sizes: list[tuple[int, int]]) -> PackedRuns:
    ends_2R1 = torch.tensor([(0, 0), *sizes]).cumsum(0).int().T.contiguous().to(CUDA)
    return PackedRuns(query_ends_R1=ends_2R1[0], key_ends_R1=ends_2R1[1], sizes=tuple(sizes))


@pytest.mark.parametrize("shape", [cases.TINY, cases.SCOUT, cases.SCOUT_QUARTER])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("num_tokens", "num_runs"), [(1, 1), (100, 1), (512, 1), (512, 4)])
def test_runs_that_begin_their_context(shape: Heads, dtype: torch.dtype, num_tokens: int, num_runs: int) -> None:
    qkv_THd = torch.randn(
        num_runs * num_tokens, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim, device=CUDA
    ).to(dtype)
    with torch.inference_mode():
        q_THd, k_THd, v_THd = qkv_THd.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
        got_TA = run_attention(q_THd, k_THd, v_THd, num_runs)
    runs = zip(*(x_THd.split(num_tokens) for x_THd in (q_THd, k_THd, v_THd)), strict=True)
    expected_TA = torch.cat([dense_attention(*run) for run in runs])
    tolerance = max(cases.TOLERANCES[dtype], 1e-4)  # fp32 kernels multiply in parts
    torch.testing.assert_close(got_TA.double(), expected_TA, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [cases.TINY, cases.SCOUT, cases.SCOUT_QUARTER])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_packed_runs(shape: Heads, dtype: torch.dtype) -> None:
    sizes = [(300, 300), (1, 77), (200, 1000), (16, 32), (1, 1)]
    num_queries, num_keys = map(sum, zip(*sizes, strict=True))
    qkv_THd = torch.randn(num_queries, shape.num_heads + 3, shape.head_dim, device=CUDA).to(dtype)
    kv_NHd = torch.randn(num_keys, 2 * shape.num_kv_heads, shape.head_dim, device=CUDA).to(dtype)
    with torch.inference_mode():
        q_THd = qkv_THd[:, : shape.num_heads]
        k_NHd, v_NHd = kv_NHd.split(shape.num_kv_heads, dim=1)
        got_TA = packed_attention(q_THd, k_NHd, v_NHd, packed(sizes))
    parts = zip(*(x.split([size[i] for size in sizes]) for i, x in ((0, q_THd), (1, k_NHd), (1, v_NHd))), strict=True)
    expected_TA = torch.cat([dense_attention(*part) for part in parts])
    tolerance = max(cases.TOLERANCES[dtype], 1e-4)  # fp32 kernels multiply in parts
    torch.testing.assert_close(got_TA.double(), expected_TA, rtol=tolerance, atol=tolerance)
