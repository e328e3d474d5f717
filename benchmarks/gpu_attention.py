"""How near the attention-side kernels come to the speed of memory, on one GPU.

Every case is a CUDA graph of several layers, each with a cache of its own, so that no layer finds its keys and values
in the second-level cache. Prints the median microseconds per layer, GB/s of the bytes that the kernel has to move, and
their share of what an elementwise kernel reaches in the same run; for runs of prompts TFLOP/s, and how long the first
call of a new length takes.

    python -m benchmarks.gpu_attention [--heads 40:8,10:2] [--batch 1,8,32,128,256] [--context 1024,2048] [--fp8-cache]
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from actors.kernels.decode_attention import (
    DecodeScratch,
    NewestTokens,
    PagedContext,
    decode_attention,
    store_and_attend,
)
from actors.kernels.heads import Heads, store_heads
from actors.kernels.norm import add_rms_norm
from actors.kernels.prefill_attention import PackedRuns, packed_attention, run_attention
from actors.kernels.step_inputs import PageTable
from benchmarks.gpu_timing import memory_gb_per_s, time_us

CUDA = torch.device("cuda")
DTYPE = torch.bfloat16
HEAD_DIM = 128
HIDDEN = 5120
PAGE_TOKENS = 16
COLD_BYTES = 512 << 20  # what the layers of a graph read between them: ten second-level caches
MAX_LAYERS = 256
NUM_REPEATS = 48  # of the kernels whose data a layer finds in the second-level cache in a model, too


def graph_us(launch: Callable[[], object]) -> float:
    """Microseconds of one `launch` in a graph."""
    return time_us([launch])


class Case:
    """Layers of B rows with contexts of equal length."""

    def __init__(self, heads: Heads, num_rows: int, context_tokens: int, cache_dtype: torch.dtype) -> None:
        self.heads = heads
        self.num_rows = num_rows
        self.context_tokens = context_tokens
        token_bytes = 2 * heads.num_kv_heads * HEAD_DIM * cache_dtype.itemsize
        self.kv_bytes = num_rows * context_tokens * token_bytes
        self.num_layers = min(MAX_LAYERS, -(-COLD_BYTES // self.kv_bytes))
        width = -(-context_tokens // PAGE_TOKENS)
        shape = (self.num_layers, num_rows * width, PAGE_TOKENS, 2 * heads.num_kv_heads, HEAD_DIM)
        self.layers_LPSHd = torch.empty(shape, dtype=DTYPE, device=CUDA).normal_().to(cache_dtype)
        self.pages_BW = torch.randperm(num_rows * width, device=CUDA).view(num_rows, width).int()
        self.qkv_BN = torch.randn(num_rows, (heads.num_heads + 2 * heads.num_kv_heads) * HEAD_DIM, device=CUDA).to(
            DTYPE
        )
        self.q_BHd = self.qkv_BN.view(num_rows, -1, HEAD_DIM)[:, : heads.num_heads]

    def launch(self, stores: bool) -> Callable[[], None]:
        """Of decode attention; `stores`: with what makes heads ready and keeps the newest."""
        context = PagedContext(
            seats_B=torch.arange(self.num_rows, dtype=torch.int32, device=CUDA),
            positions_B=torch.full((self.num_rows,), self.context_tokens - 1, device=CUDA),
            table=PageTable(pages_SW=self.pages_BW, page_tokens=PAGE_TOKENS),
            chunk_tokens=0,
        )
        scratch = DecodeScratch(self.heads, self.num_rows, CUDA)
        newest = NewestTokens(
            write_slots_B=self.pages_BW[:, -1].long() * PAGE_TOKENS + (self.context_tokens - 1) % PAGE_TOKENS,
            rotations_BR2=torch.randn(self.num_rows, HEAD_DIM // 2, 2, device=CUDA),
            temperatures_B=None,
        )

        def launch() -> None:
            for pages_PSHd in self.layers_LPSHd:
                if stores:
                    store_and_attend(self.qkv_BN, pages_PSHd, newest, context, self.heads, scratch)
                else:
                    decode_attention(self.q_BHd, pages_PSHd, context, self.heads, scratch)

        return launch


def report(name: str, num_rows: int, context: str, us: float, num_bytes: float, peak: float) -> None:
    rate = num_bytes / us / 1e3
    print(f"{name:24} {num_rows:6} {context:>8} {us:10.1f} {rate:8.0f} {rate / peak:7.0%}", flush=True)


def decode(heads: Heads, options: argparse.Namespace, peak: float) -> None:
    cache_dtype = torch.float8_e4m3fn if options.fp8_cache else DTYPE
    for num_rows, tokens in itertools.product(options.batch, options.context):
        case = Case(heads, num_rows, tokens, cache_dtype)
        for name, stores in (("decode", False), ("heads, decode", True)):
            us = graph_us(case.launch(stores)) / case.num_layers
            report(f"{name} {heads.num_heads}:{heads.num_kv_heads}", num_rows, str(tokens), us, case.kv_bytes, peak)


def small_kernels(heads: Heads, options: argparse.Namespace, peak: float) -> None:
    """The norm with two additions, and rotation, norm and store, as a step of B tokens has them in every layer."""
    for num_rows in (*options.batch, 8192):
        h_TD, a_TD, b_TD = torch.randn(3, num_rows, HIDDEN, device=CUDA).to(DTYPE)
        weight_D = torch.ones(HIDDEN, device=CUDA, dtype=DTYPE)

        def norm(
            h_TD: Tensor = h_TD, deltas: tuple[Tensor, Tensor] = (a_TD, b_TD), weight_D: Tensor = weight_D
        ) -> None:
            for _ in range(NUM_REPEATS):
                add_rms_norm(h_TD, deltas, weight_D, 1e-5)

        report("add_rms_norm", num_rows, "-", graph_us(norm) / NUM_REPEATS, 5 * h_TD.nbytes, peak)
        num_all = heads.num_heads + 2 * heads.num_kv_heads
        qkv_TN = torch.randn(num_rows, num_all * HEAD_DIM, device=CUDA).to(DTYPE)
        tokens_NHd = torch.empty(num_rows, 2 * heads.num_kv_heads, HEAD_DIM, dtype=DTYPE, device=CUDA)
        slots_T = torch.randperm(num_rows, device=CUDA)
        rotations_TR2 = torch.randn(num_rows, HEAD_DIM // 2, 2, device=CUDA)

        def store(given: tuple[Tensor, ...] = (qkv_TN, tokens_NHd, slots_T), turns: Tensor = rotations_TR2) -> None:
            for _ in range(NUM_REPEATS):
                store_heads(*given, heads, turns, None)

        moved = 2 * qkv_TN.nbytes + rotations_TR2.nbytes
        report(
            f"store_heads {heads.num_heads}:{heads.num_kv_heads}",
            num_rows,
            "-",
            graph_us(store) / NUM_REPEATS,
            moved,
            peak,
        )


def prompts(heads: Heads) -> None:
    """TFLOP/s of runs that begin their context, one call for each, and of others, which are packed."""
    name = f"{heads.num_heads}:{heads.num_kv_heads}"
    for num_runs, num_tokens in ((8, 1024), (1, 8192), (16, 512)):
        q, k, v = _split(heads, num_runs * num_tokens)
        runs = list(zip(q.split(num_tokens), k.split(num_tokens), v.split(num_tokens), strict=True))
        us = graph_us(lambda runs=runs: [run_attention(*run) for run in runs])  # type: ignore[misc]
        _report_run(f"fresh {name}", heads, [(num_tokens, num_tokens)] * num_runs, us)
    for sizes in ([(1024, 1024)] * 8, [(1024, 8192)], [(2048, 4096)] * 4, [(128, 1024)] * 8):
        num_queries, num_keys = (sum(column) for column in zip(*sizes, strict=True))
        q = _split(heads, num_queries)[0]
        tokens_NHd = torch.randn(num_keys, 2 * heads.num_kv_heads, HEAD_DIM, device=CUDA).to(DTYPE)
        slots_N = torch.randperm(num_keys // PAGE_TOKENS, device=CUDA).repeat_interleave(PAGE_TOKENS) * PAGE_TOKENS
        slots_N += torch.arange(num_keys, device=CUDA) % PAGE_TOKENS
        ends_2R1 = torch.tensor([(0, 0), *sizes]).cumsum(0).int().T.contiguous().to(CUDA)
        packed = PackedRuns(query_ends_R1=ends_2R1[0], key_ends_R1=ends_2R1[1], sizes=tuple(sizes))

        def launch(q: Tensor = q, kept: Tensor = tokens_NHd, at: Tensor = slots_N, runs: PackedRuns = packed) -> None:
            packed_attention(q, *kept.index_select(0, at).split(heads.num_kv_heads, dim=1), runs)

        _report_run(f"packed {name}", heads, sizes, graph_us(launch))


def _split(heads: Heads, num_tokens: int) -> tuple[Tensor, ...]:
    """Queries, keys and values of tokens, as the fused projection leaves them."""
    qkv_THd = torch.randn(num_tokens, heads.num_heads + 2 * heads.num_kv_heads, HEAD_DIM, device=CUDA).to(DTYPE)
    return qkv_THd.split((heads.num_heads, heads.num_kv_heads, heads.num_kv_heads), dim=1)


def _report_run(name: str, heads: Heads, sizes: list[tuple[int, int]], us: float) -> None:
    flop = sum(4 * queries * (keys - queries / 2) for queries, keys in sizes) * heads.num_heads * HEAD_DIM
    print(
        f"{name:14} {len(sizes)} x {sizes[0][0]} of {sizes[0][1]} {us:8.0f} us {flop / us / 1e6:6.0f} TFLOP/s",
        flush=True,
    )


def first_calls(heads: Heads) -> None:
    """Milliseconds of the first, second and third call of lengths that are new to the process."""
    for num_tokens in (512, 1024, 1536, 2048, 1000, 4096, 1333):
        q, k, v = _split(heads, num_tokens)
        taken_ms = []
        for _ in range(3):
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            run_attention(q, k, v)
            called_s = time.perf_counter()
            torch.cuda.synchronize()
            taken_ms.append(f"{(called_s - began_s) * 1e3:.2f}+{(time.perf_counter() - called_s) * 1e3:.2f}")
        print(f"calls of {num_tokens:5} tokens, ms on the host + until done: {' '.join(taken_ms)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="40:8,10:2")
    parser.add_argument("--batch", type=_numbers, default=(1, 8, 32, 128, 256))
    parser.add_argument("--context", type=_numbers, default=(1024, 2048))
    parser.add_argument("--fp8-cache", action="store_true")
    options = parser.parse_args()
    peak = memory_gb_per_s()
    print(f"{torch.cuda.get_device_name()}: memory {peak:.0f} GB/s")
    print(f"{'kernel':24} {'B':>6} {'context':>8} {'us':>10} {'GB/s':>8} {'share':>7}")
    for pair in options.heads.split(","):
        num_heads, num_kv_heads = map(int, pair.split(":"))
        heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, qk_norm_eps=1e-5)
        with torch.inference_mode():
            first_calls(heads)
            prompts(heads)
            decode(heads, options, peak)
            small_kernels(heads, options, peak)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
