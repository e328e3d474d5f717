"""What it costs to send the tokens of a MoE layer to their experts on other GPUs and back, in CUDA graphs.

One process per GPU. The experts do nothing, so what is timed is dispatch itself: choosing replicas, scaling, the rows
both ways, and every wait. Beside it, in the same run, what NCCL takes to move as many rows: an all-to-all and back that
knows how many rows go where (which it would have to be told) and one that does not (room for all rows in every
message), and an all-gather and reduce-scatter. Prints the microseconds per MoE layer on the slowest rank.

    python benchmarks/gpu_dispatch.py [--gpus 2] [--tokens 1,16,64,128,256] [--profile]
"""

import argparse
import os
import statistics
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from actors.dispatch.contract import build_routing_table
from actors.dispatch.group import EpochGroup, RendezvousStore
from actors.dispatch.peer_memory import SymmetricMemory
from actors.dispatch.rows import TokenShape
from actors.dispatch.symmetric import SymmetricDispatch

ADDRESS = "127.0.0.1"
HIDDEN = 5120
NUM_EXPERTS = 128
NUM_LAYERS = 24
MAX_TOKENS = 256
TIMEOUT_S = 10.0
WARMUP_REPLAYS, REPLAYS, ROUNDS = 5, 20, 5
LAYERS = tuple(range(NUM_LAYERS))


class Layout(NamedTuple):
    name: str
    attention: tuple[int, ...]
    experts: tuple[int, ...]


def layouts_of(gpus: int) -> Iterator[Layout]:
    everyone = tuple(range(gpus))
    yield Layout(f"colocated {gpus}", everyone, everyone)
    for attention in range(1, gpus // 2 + 1):
        yield Layout(f"{attention}A+{gpus - attention}E", everyone[:attention], everyone[attention:])


def do_nothing(layer: int, x_ND: Tensor, slots_N: Tensor) -> Tensor:
    return x_ND


class Rank(NamedTuple):
    number: int
    world: int
    group: EpochGroup
    device: torch.device


def make_dispatch(rank: Rank, layout: Layout) -> SymmetricDispatch:
    slots = {
        r: dict.fromkeys(LAYERS, tuple(range(i, NUM_EXPERTS, len(layout.experts))))
        for i, r in enumerate(layout.experts)
    }
    dispatch = SymmetricDispatch(
        SymmetricMemory(rank.group, rank.device, TIMEOUT_S),
        build_routing_table(slots, LAYERS, NUM_EXPERTS, rank.device),
        do_nothing if rank.number in layout.experts else None,
        layout.attention,
        TokenShape(hidden=HIDDEN, experts_per_token=1, dtype=torch.bfloat16, device=rank.device),
        TIMEOUT_S,
        MAX_TOKENS,
        layout.name,
    )
    dispatch.start()
    return dispatch


def symmetric_step(rank: Rank, dispatch: SymmetricDispatch, layout: Layout, num_tokens: int) -> Callable[[], None]:
    """A step of all layers, whose tokens are spread evenly at random."""
    counts = tuple(num_tokens if r in layout.attention else 0 for r in range(rank.world))
    if rank.number not in layout.attention:
        return lambda: dispatch.serve_step(counts)
    rng = torch.Generator().manual_seed(rank.number)
    x_TD = torch.randn(num_tokens, HIDDEN, generator=rng).to(rank.device, torch.bfloat16)
    ids_LT1 = torch.randint(NUM_EXPERTS, (NUM_LAYERS, num_tokens, 1), generator=rng).to(rank.device)
    scores_T1 = torch.rand(num_tokens, 1, generator=rng).to(rank.device, torch.bfloat16)

    def step() -> None:
        dispatch.begin_step(counts)
        for layer in LAYERS:
            dispatch.combine(dispatch.dispatch(x_TD, ids_LT1[layer], scores_T1, layer))

    return step


def nccl_steps(rank: Rank, num_tokens: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """There and back in each of the layers."""
    world = rank.world
    own_TD = torch.zeros(num_tokens, HIDDEN, dtype=torch.bfloat16, device=rank.device)
    all_ND = own_TD.new_zeros(world * num_tokens, HIDDEN)
    other_ND = torch.zeros_like(all_ND)

    def all_to_all(num_rows: int) -> Callable[[], None]:
        def step() -> None:
            for _ in LAYERS:
                dist.all_to_all_single(other_ND[:num_rows], all_ND[:num_rows])
                dist.all_to_all_single(all_ND[:num_rows], other_ND[:num_rows])

        return step

    def gather_scatter() -> None:
        for _ in LAYERS:
            dist.all_gather_into_tensor(all_ND, own_TD)
            dist.reduce_scatter_tensor(own_TD, all_ND)

    yield "NCCL all-to-all, counts known", all_to_all(-(-num_tokens // world) * world)
    yield "NCCL all-to-all, padded", all_to_all(num_tokens * world)
    yield "NCCL all-gather + reduce-scatter", gather_scatter


def time_graph(step: Callable[[], None], device: torch.device) -> float:
    """Median microseconds per layer of a captured step."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
        took_us = []
        for round_idx in range(ROUNDS + 1):
            dist.barrier()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            replays = REPLAYS if round_idx else WARMUP_REPLAYS
            begin.record(stream)
            for _ in range(replays):
                graph.replay()
            end.record(stream)
            stream.synchronize()
            took_us.append(begin.elapsed_time(end) * 1e3 / replays / NUM_LAYERS)
    return statistics.median(took_us[1:])


def profile_kernels(step: Callable[[], None], device: torch.device) -> str:
    """Mean microseconds of each kernel of an eager step; waits for peers are in those that wait."""
    step()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    kernels = [event for event in profiler.key_averages() if event.device_time_total]
    return ", ".join(f"{k.key[:28]} {k.device_time_total / k.count:.1f} us x{k.count}" for k in kernels)


def run_rank(number: int, world: int, tokens: list[int], profile: bool, endpoint: str, results: Any) -> None:
    try:
        measure(number, world, tokens, profile, endpoint, results)
        results.put((number, None, None, "done"))
    except BaseException:
        results.put((number, None, None, traceback.format_exc()))
        raise


def measure(number: int, world: int, tokens: list[int], profile: bool, endpoint: str, results: Any) -> None:
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    group = EpochGroup(device, ADDRESS)
    group.prepare(endpoint)
    group.join(1, number, world, 60.0, TIMEOUT_S)
    rank = Rank(number, world, group, device)
    host, _, port = endpoint.rpartition(":")
    store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
    dist.init_process_group(
        "nccl", store=dist.PrefixStore("benchmark", store), rank=number, world_size=world, device_id=device
    )
    for layout in layouts_of(world):
        dispatch = make_dispatch(rank, layout)
        for num_tokens in tokens:
            step = symmetric_step(rank, dispatch, layout, num_tokens)
            results.put((number, f"symmetric, {layout.name}", num_tokens, time_graph(step, device)))
            dispatch.wait()
            if profile and num_tokens == max(tokens):
                results.put((number, f"symmetric, {layout.name}", None, profile_kernels(step, device)))
                dispatch.wait()
        dispatch.close()
    for num_tokens in tokens:
        for name, step in nccl_steps(rank, num_tokens):
            results.put((number, name, num_tokens, time_graph(step, device)))
    dist.destroy_process_group()
    group.leave()


def collect(results: Any, world: int) -> tuple[dict[str, dict[int, float]], list[str]]:
    """The slowest rank's figure by name and tokens, and what else was said. Ends when all ranks are done."""
    table: dict[str, dict[int, float]] = {}
    notes, running = [], world
    while running:
        number, name, num_tokens, value = results.get(timeout=120)
        if name is None:
            running -= 1
            if value != "done":
                print(value, flush=True)
                break
        elif num_tokens is None:
            notes.append(f"{name}, rank {number}: {value}")
        else:
            row = table.setdefault(name, {})
            row[num_tokens] = max(row.get(num_tokens, 0.0), value)
    return table, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument(
        "--tokens", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16, 64, 128, 256],
        help="tokens per attention rank",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="also the kernels' own times")
    options = parser.parse_args()
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no multicast
    store = RendezvousStore(ADDRESS)
    store.start()
    context = mp.get_context("spawn")
    results = context.Queue()
    arguments = (options.gpus, options.tokens, options.profile, store.endpoint, results)
    processes = [context.Process(target=run_rank, args=(number, *arguments)) for number in range(options.gpus)]
    for process in processes:
        process.start()
    table, notes = collect(results, options.gpus)
    for process in processes:
        process.join(10)
        process.kill()
    store.stop()
    print(f"torch {torch.__version__}, {options.gpus} x {torch.cuda.get_device_name(0)}, bf16 rows of {HIDDEN}, top-1")
    print("us per MoE layer, dispatch + combine, in a graph of 24 layers\n")
    print("| tokens per attention rank | " + " | ".join(map(str, options.tokens)) + " |")
    print("|---" * (len(options.tokens) + 1) + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[n]:.1f}" if n in row else "-" for n in options.tokens) + " |")
    for note in notes:
        print(f"\n{note}")


if __name__ == "__main__":
    main()
