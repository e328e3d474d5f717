"""What it costs to send the tokens of a MoE layer to their experts and back, per layout.

Real processes on this host over gloo. The experts do nothing, so what is timed is dispatch itself: choosing, sorting,
packing, the wire both ways, and putting results back. "wire" is the floor: one message of the same bytes to a peer and
back, and nothing else. Prints the median microseconds per MoE layer on the slowest attention rank, and the 99th
percentile.

    python benchmarks/dispatch.py [--tokens 1,16,256,1024] [--hidden 512,5120] [--dtype float32]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
from torch import Tensor

from actors.dispatch.collective import CollectiveDispatch
from actors.dispatch.contract import Dispatch, build_routing_table
from actors.dispatch.group import EpochGroup, RendezvousStore
from actors.dispatch.local import LocalDispatch
from actors.dispatch.rows import TokenShape

CPU = torch.device("cpu")
NUM_EXPERTS = 16
LAYERS = tuple(range(8))
TIME_PER_CASE_S = 1.0
ADDRESS = "127.0.0.1"


class Layout(NamedTuple):
    name: str
    attention: tuple[int, ...]
    experts: tuple[int, ...]


LAYOUTS = (
    Layout("single", (0,), (0,)),
    Layout("wire", (0,), (1,)),
    Layout("1A+1E", (0,), (1,)),
    Layout("2A+2E", (0, 1), (2, 3)),
    Layout("colocated-2", (0, 1), (0, 1)),
)


class Case(NamedTuple):
    tokens: int
    hidden: int
    dtype: torch.dtype


def do_nothing(layer: int, x_ND: Tensor, slots_N: Tensor) -> Tensor:
    return x_ND


def routing_of(layout: Layout) -> Any:
    slots = {
        rank: {layer: tuple(range(i, NUM_EXPERTS, len(layout.experts))) for layer in LAYERS}
        for i, rank in enumerate(layout.experts)
    }
    return build_routing_table(slots, LAYERS, NUM_EXPERTS, CPU)


def time_layers(dispatch: Dispatch, counts: tuple[int, ...], case: Case, steps: int, rank: int) -> list[float]:
    """Microseconds of each layer of each step; the input is ready before the clock starts."""
    rng = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(case.tokens, case.hidden, generator=rng).to(case.dtype)
    ids_TK = torch.randint(NUM_EXPERTS, (case.tokens, 1), generator=rng)
    scores_TK = torch.rand(case.tokens, 1, generator=rng).to(case.dtype)
    elapsed_us = []
    for _ in range(steps):
        dispatch.begin_step(counts)
        for layer in LAYERS:
            start_s = time.perf_counter()
            dispatch.combine(dispatch.dispatch(x_TD, ids_TK, scores_TK, layer))
            elapsed_us.append((time.perf_counter() - start_s) * 1e6)
    return elapsed_us


def time_wire(group: EpochGroup, case: Case, steps: int) -> list[float]:
    """Microseconds of each round trip of rank 0; rank 1 echoes."""
    out_TD = torch.zeros(case.tokens, case.hidden, dtype=case.dtype)
    in_TD = torch.zeros_like(out_TD)
    elapsed_us = []
    for _ in range(steps * len(LAYERS)):
        start_s = time.perf_counter()
        receive = group.post((), [(1 - group.rank, in_TD)], 0)
        if group.rank == 1:
            receive.wait()
        send = group.post([(1 - group.rank, out_TD)], (), 0)
        if group.rank == 0:
            receive.wait()
        send.wait()
        elapsed_us.append((time.perf_counter() - start_s) * 1e6)
    return elapsed_us


def run_rank(rank: int, layout: Layout, cases: list[Case], endpoint: str, results: Any, barrier: Any) -> None:
    torch.set_num_threads(1)
    world = max((*layout.attention, *layout.experts)) + 1
    group = EpochGroup(CPU, ADDRESS)
    group.prepare(endpoint)
    routing = routing_of(layout)
    for epoch, case in enumerate(cases):
        barrier.wait(60)
        group.join(epoch, rank, world, 30.0, 30.0)
        shape = TokenShape(hidden=case.hidden, experts_per_token=1, dtype=case.dtype, device=CPU)
        experts = do_nothing if rank in layout.experts else None
        dispatch = CollectiveDispatch(group, routing, experts, layout.attention, shape)
        counts = tuple(case.tokens if r in layout.attention else 0 for r in range(world))
        steps = steps_of(case)
        if layout.name == "wire":
            elapsed_us = time_wire(group, case, steps)
            if rank == 0:
                results.put((epoch, *summary(elapsed_us)))
        elif rank in layout.attention:
            time_layers(dispatch, counts, case, max(1, steps // 10), rank)
            elapsed_us = time_layers(dispatch, counts, case, steps, rank)
            results.put((epoch, *summary(elapsed_us)))
        else:
            for _ in range(max(1, steps // 10) + steps):
                dispatch.serve_step(counts)
    barrier.wait(60)
    group.leave()


def summary(elapsed_us: list[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    return statistics.median(elapsed_us), sorted(elapsed_us)[int(len(elapsed_us) * 0.99)]


def steps_of(case: Case) -> int:
    """Enough steps for a median, few enough for patience; the same on every rank."""
    guess_us = 400 + case.tokens * case.hidden / 200
    return max(5, int(TIME_PER_CASE_S * 1e6 / guess_us / len(LAYERS)))


def measure_group(layout: Layout, cases: list[Case]) -> list[tuple[float, float]]:
    store = RendezvousStore(ADDRESS)
    store.start()
    context = mp.get_context("spawn")
    results = context.Queue()
    world = max((*layout.attention, *layout.experts)) + 1
    barrier = context.Barrier(world)
    processes = [
        context.Process(target=run_rank, args=(rank, layout, cases, store.endpoint, results, barrier))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    worst = [(0.0, 0.0)] * len(cases)
    for _ in range(len(cases) * len(layout.attention)):
        epoch, median_us, p99_us = results.get(timeout=120)
        worst[epoch] = max(worst[epoch], (median_us, p99_us))
    for process in processes:
        process.join()
    store.stop()
    return worst


def measure_single(layout: Layout, cases: list[Case]) -> list[tuple[float, float]]:
    torch.set_num_threads(1)
    measured = []
    for case in cases:
        dispatch = LocalDispatch(do_nothing, routing_of(layout))
        elapsed_us = time_layers(dispatch, (case.tokens,), case, steps_of(case), 0)
        measured.append(summary(elapsed_us))
    return measured


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=numbers, default=[1, 16, 256, 1024], help="tokens per attention rank")
    parser.add_argument("--hidden", type=numbers, default=[512, 5120])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    cases = [
        Case(tokens, hidden, getattr(torch, options.dtype)) for hidden in options.hidden for tokens in options.tokens
    ]
    print(f"torch {torch.__version__}, {options.dtype}, {NUM_EXPERTS} experts, top-1; us per MoE layer, median (p99)\n")
    print("| layout | " + " | ".join(f"D {case.hidden}, {case.tokens} tok/rank" for case in cases) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for layout in LAYOUTS:
        measure: Callable[[Layout, list[Case]], list[tuple[float, float]]] = (
            measure_single if layout.name == "single" else measure_group
        )
        row = [f"{median:.0f} ({p99:.0f})" for median, p99 in measure(layout, cases)]
        print(f"| {layout.name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
