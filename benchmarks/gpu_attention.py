"""How near the attention-side kernels come to the speed of memory, on one GPU.

Every case is a CUDA graph of several layers, each with a cache of its own, so that no layer finds its keys and values
in the second-level cache. Prints the median microseconds per layer, GB/s of the bytes that the kernel has to move, and
their share of what an elementwise kernel reaches in the same run; FlashInfer stands beside ours where it is installed.

    python -m benchmarks.gpu_attention [--heads 40:8,10:2] [--batch 1,8,32,128,256] [--context 1024,2048] [--fp8-cache]
"""

import argparse
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from actors.kernels.decode_attention import DecodeContext, DecodeScratch, decode_attention
from actors.kernels.decode_inputs import PageTable
from actors.kernels.heads import Heads, store_heads
from actors.kernels.norm import add_rms_norm
from actors.kernels.prefill_attention import WORKSPACE_BYTES, PagedPrefill, PrefillRun, is_available
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

    def ours(self) -> Callable[[], None]:
        context = DecodeContext(
            seats_B=torch.arange(self.num_rows, dtype=torch.int32, device=CUDA),
            positions_B=torch.full((self.num_rows,), self.context_tokens - 1, device=CUDA),
            table=PageTable(pages_SW=self.pages_BW, page_tokens=PAGE_TOKENS),
            chunk_tokens=0,
        )
        scratch = DecodeScratch(self.heads, self.num_rows, CUDA)

        def launch() -> None:
            for pages_PSHd in self.layers_LPSHd:
                decode_attention(self.q_BHd, pages_PSHd, context, self.heads, scratch)

        return launch

    def flashinfers(self) -> Callable[[], None]:
        import flashinfer

        rows = torch.arange(self.num_rows + 1, dtype=torch.int32)
        width = self.pages_BW.shape[1]
        last = torch.full((self.num_rows,), self.context_tokens - (width - 1) * PAGE_TOKENS, dtype=torch.int32)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=CUDA),
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=torch.empty(self.num_rows + 1, dtype=torch.int32, device=CUDA),
            paged_kv_indices_buffer=torch.empty(self.num_rows * width, dtype=torch.int32, device=CUDA),
            paged_kv_last_page_len_buffer=torch.empty(self.num_rows, dtype=torch.int32, device=CUDA),
        )
        wrapper.plan(
            rows * width, self.pages_BW.view(-1), last, self.heads.num_heads, self.heads.num_kv_heads, HEAD_DIM,
            PAGE_TOKENS, q_data_type=DTYPE, kv_data_type=self.layers_LPSHd.dtype,
        )  # fmt: skip
        out_BHd = torch.empty_like(self.q_BHd, memory_format=torch.contiguous_format)

        def launch() -> None:
            for pages_PSHd in self.layers_LPSHd:
                wrapper.run(self.q_BHd, pages_PSHd.split(self.heads.num_kv_heads, dim=2), out=out_BHd)

        return launch


def report(name: str, num_rows: int, context: str, us: float, num_bytes: float, peak: float) -> None:
    rate = num_bytes / us / 1e3
    print(f"{name:24} {num_rows:6} {context:>8} {us:10.1f} {rate:8.0f} {rate / peak:7.0%}", flush=True)


def compare_decode(heads: Heads, options: argparse.Namespace, peak: float) -> None:
    cache_dtype = torch.float8_e4m3fn if options.fp8_cache else DTYPE
    has_flashinfer = is_available(CUDA, DTYPE, HEAD_DIM)
    for num_rows, tokens in itertools.product(options.batch, options.context):
        case = Case(heads, num_rows, tokens, cache_dtype)
        kinds = {"ours": case.ours} | ({"flashinfer": case.flashinfers} if has_flashinfer else {})
        for kind, make in kinds.items():
            us = graph_us(make()) / case.num_layers
            name = f"{kind} {heads.num_heads}:{heads.num_kv_heads}"
            report(name, num_rows, str(tokens), us, case.kv_bytes, peak)


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


def prefill(heads: Heads) -> None:
    """TFLOP/s of FlashInfer's paged prefill: a chunk alone, and the end of a long context."""
    for num_queries, num_keys in ((8192, 8192), (1024, 8192)):
        pages_PSHd = torch.randn(num_keys // PAGE_TOKENS, PAGE_TOKENS, 2 * heads.num_kv_heads, HEAD_DIM, device=CUDA)
        q_THd = torch.randn(num_queries, heads.num_heads, HEAD_DIM, device=CUDA).to(DTYPE)
        paged = PagedPrefill(heads, PAGE_TOKENS, DTYPE, DTYPE)
        paged.start(CUDA)
        ids_N = torch.randperm(num_keys // PAGE_TOKENS).numpy()
        paged.plan([PrefillRun(num_queries=num_queries, num_keys=num_keys, page_ids_N=ids_N)])
        pages_PSHd = pages_PSHd.to(DTYPE)

        def launch(q: Tensor = q_THd, pages: Tensor = pages_PSHd, paged: PagedPrefill = paged) -> None:
            paged.run(q, pages)

        us = graph_us(launch)
        pairs = num_queries * (num_keys - num_queries / 2)
        rate = 4 * pairs * heads.num_heads * HEAD_DIM / us / 1e6
        print(
            f"prefill {heads.num_heads}:{heads.num_kv_heads}: {num_queries} of {num_keys} {us:.0f} us {rate:.0f} TF/s"
        )


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
        compare_decode(heads, options, peak)
        small_kernels(heads, options, peak)
        if is_available(CUDA, DTYPE, HEAD_DIM):
            prefill(heads)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
