"""How the benchmarks of kernels measure: time of launches in a CUDA graph, and what the device's memory can do.

Owns the two yardsticks that all of them share. Knows no kernel.
"""

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 9
COPIED_BYTES = 2 << 30  # forty second-level caches
NUM_COPIES = 4


def time_us(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """Microseconds per call: the median over replays of one graph of all calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    elapsed_us = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        elapsed_us.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(elapsed_us)


def memory_gb_per_s() -> float:
    """GB/s, read and written, of a kernel that negates 2 GiB: what a kernel that only moves bytes can reach.

    Not of `Tensor.copy_`, which a graph holds as a memory copy that is no kernel, and slower.
    """
    source = torch.zeros(COPIED_BYTES // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    us = time_us([lambda: torch.neg(source, out=target)] * NUM_COPIES)
    return 2 * COPIED_BYTES / us / 1e3
