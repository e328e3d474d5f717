"""Where a step's microseconds go: kernels of one step, by torch's profiler, without a router.

Decode steps are captured; with `--prefill TOKENS` steps of so many tokens are looked into instead, all of prompts of
`--context-tokens` each. `--gpus` above 1: as many ranks of one attention unit. The first is looked into; what it waits
for the others is in the kernels that sum. Spare `expert_slots` hold replicas, as they would after a while of load.

    python -m benchmarks.gpu_profile --shape scout-fp8 --layers 4 --batches 1,32
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from actors.attention.captured import most_step_rows
from actors.attention.local_model import LocalModel
from actors.attention.worker import AttentionWorker
from actors.checkpoint.config import read_model_config
from actors.checkpoint.shard import Shard
from actors.config import PipelineConfig
from actors.dispatch.contract import Dispatch, build_routing_table
from actors.dispatch.group import EpochGroup, RendezvousStore
from actors.dispatch.local import LocalDispatch
from actors.dispatch.replicated import ReplicatedDispatch
from actors.dispatch.rows import TokenShape
from actors.dispatch.tensor_parallel import make_tensor_parallel
from actors.expert.worker import ExpertWorker
from actors.precision import compute_dtype
from actors.types import EMPTY_SLOT, Admission, RankPlan, SamplingParams, Work
from benchmarks.gpu_decode import describe_model
from cluster.floors import Split
from cluster.layout import rank_specs

PROFILED_STEPS = 3
LAUNCHES = "launches of the profiled steps"
GREEDY = SamplingParams(max_tokens=10**6, temperature=0.0)
HOST = "127.0.0.1"
GROUP_TIMEOUT_S = 20.0
JOIN_TIMEOUT_S = 60.0


def with_replicas(held: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Experts of each rank's slots; in those that were empty are replicas of others' experts, no expert twice more than
    another.
    """
    experts_of = [[expert for expert in of_rank if expert != EMPTY_SLOT] for of_rank in held]
    order = [expert for row in zip_longest(*experts_of) for expert in row if expert is not None]
    filled = []
    for own, of_rank in zip(experts_of, held, strict=True):
        taken = [expert for expert in order if expert not in own][: len(of_rank) - len(own)]
        order = [expert for expert in order if expert not in taken] + taken
        filled.append((*own, *taken))
    return filled


class UnitMember:
    """One rank of an attention unit that has all of the model: what `Decoding` needs of a `LocalModel`. Collective."""

    def __init__(self, pipeline: PipelineConfig, index: int, size: int, store: str) -> None:
        device = torch.device(f"cuda:{index}")
        torch.cuda.set_device(device)
        self.config = config = read_model_config(Path(pipeline.model))
        shape = TokenShape(
            hidden=config.hidden_size, experts_per_token=config.experts_per_token,
            dtype=compute_dtype(config, pipeline), device=device,
        )  # fmt: skip
        split = Split(
            layout="colocated", attention_ranks=size, expert_ranks=size, attention_tp=size, expert_tp=pipeline.expert_tp
        )
        specs = rank_specs(split, config, expert_slots=pipeline.expert_slots)
        held = {layer: with_replicas([spec.slots[layer] for spec in specs]) for layer in config.moe_layers}
        slots = {spec.rank: {layer: of_ranks[spec.rank] for layer, of_ranks in held.items()} for spec in specs}
        tp = make_tensor_parallel((index, size), shape, most_step_rows(pipeline))
        part, of = specs[index].expert_shard
        experts = ExpertWorker.load(config, pipeline, slots[index], device, shard=Shard(index=part, of=of))
        self.attention = AttentionWorker.load(config, pipeline, device, tp=tp)
        self.pools = self.attention.allocate_cache()
        self.attention.rehearse(experts, {layer: len(of_layer) for layer, of_layer in slots[index].items()})
        self._group = EpochGroup(device, HOST)
        self._group.prepare(store)
        self._group.join(1, index, size, JOIN_TIMEOUT_S, GROUP_TIMEOUT_S)
        tp.join(self._group, range(size), True)
        self._dispatch: Dispatch
        if of > 1:
            table = build_routing_table({0: slots[index]}, config.moe_layers, config.num_experts, device)
            self._dispatch = LocalDispatch(experts, table)
        else:
            self._dispatch = ReplicatedDispatch(experts, slots, config.moe_layers, config.num_experts, index, device)
        self.attention.start_epoch(self._dispatch)
        self.attention.capture()

    def start_epoch(self) -> None:
        """Forgets all requests and whose pages were whose."""
        self.attention.start_epoch(self._dispatch, keeps_graphs=True)


class Decoding:
    """A batch of requests that decode in step, driven by plans as a rank is."""

    def __init__(self, model: LocalModel | UnitMember, batch: int, context_tokens: int) -> None:
        self._model = model
        self._batch = batch
        self._length = context_tokens
        model.start_epoch()
        rng, size = random.Random(batch), model.pools.page_tokens
        self._size = size
        self._next_page = 0
        for idx in range(batch):
            ids = tuple(rng.randrange(model.config.vocab_size) for _ in range(context_tokens))
            pages = self._take(-(-context_tokens // size))
            admission = Admission(request_idx=idx, prompt_ids=ids, output_ids=(), sampling=GREEDY)
            work = Work(
                request_idx=idx, start=0, num_tokens=context_tokens, samples=True, global_pages=pages,
                chunked_pages=pages,
            )  # fmt: skip
            model.attention.step(RankPlan(admitted=(admission,), work=(work,)))

    def _take(self, num: int) -> tuple[int, ...]:
        self._next_page += num
        return tuple(range(self._next_page - num, self._next_page))

    def launch(self) -> object:
        """One step, not waited for."""
        start = self._length
        work = []
        for idx in range(self._batch):
            pages = self._take(1) if start % self._size == 0 else ()
            work.append(
                Work(request_idx=idx, start=start, num_tokens=1, samples=True, global_pages=pages, chunked_pages=pages)
            )
        plan = RankPlan(work=tuple(work))
        self._model.attention.take_in(plan)
        self._length += 1
        return self._model.attention.launch(plan)


class Prefilling:
    """Steps of `num_tokens`, all of prompts that begin and end in the step: the same pages every time."""

    def __init__(self, model: LocalModel | UnitMember, num_tokens: int, prompt_tokens: int) -> None:
        self._model = model
        rng, lengths = random.Random(num_tokens), [prompt_tokens] * (num_tokens // prompt_tokens)
        if num_tokens % prompt_tokens:
            lengths.append(num_tokens % prompt_tokens)
        self._prompts = [tuple(rng.choices(range(model.config.vocab_size), k=length)) for length in lengths]
        self._released: tuple[int, ...] = ()
        model.start_epoch()

    def launch(self) -> object:
        """One step, not waited for."""
        size, next_page = self._model.pools.page_tokens, 0
        admitted, work = [], []
        for idx, ids in enumerate(self._prompts):
            length = len(ids)
            pages = tuple(range(next_page, next_page + -(-length // size)))
            next_page += len(pages)
            admitted.append(Admission(request_idx=idx, prompt_ids=ids, output_ids=(), sampling=GREEDY))
            work.append(
                Work(request_idx=idx, start=0, num_tokens=length, samples=True, global_pages=pages, chunked_pages=pages)
            )
        plan = RankPlan(released=self._released, admitted=tuple(admitted), work=tuple(work))
        self._released = tuple(range(len(admitted)))
        self._model.attention.take_in(plan)
        return self._model.attention.launch(plan)


@dataclass(frozen=True, slots=True)
class Profile:
    """Of one step: its milliseconds, those that the host takes to launch it, its launches and microseconds by kernel.
    `waits`: calls that make the host wait, by name, while all profiled steps were launched.
    `idle_ms`: while no kernel ran.
    """

    step_ms: float
    host_ms: float
    kernels: dict[str, tuple[int, float]]
    waits: dict[str, int]
    idle_ms: float
    num_launches: int


def profile(steps: Decoding | Prefilling, num_steps: int) -> Profile:
    """Times `num_steps` steps, then looks into PROFILED_STEPS."""
    for _ in range(3):
        steps.launch()
    torch.cuda.synchronize()
    host_ms = min(_launch_ms(steps) for _ in range(3))
    began_s = time.perf_counter()
    for _ in range(num_steps):
        steps.launch()
    torch.cuda.synchronize()
    step_ms = (time.perf_counter() - began_s) / num_steps * 1e3
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function(LAUNCHES):
            for _ in range(PROFILED_STEPS):
                steps.launch()
        torch.cuda.synchronize()
    num_launches = 0
    waits: dict[str, int] = defaultdict(int)
    totals: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    ran_us: list[tuple[float, float]] = []
    events = profiler.events()
    launched_us = min(event.time_range.end for event in events if event.name == LAUNCHES)  # of the host: it is ahead
    for event in events:
        if event.name == LAUNCHES:
            continue
        if event.device_type == torch.profiler.DeviceType.CUDA:
            count, us = totals[event.name]
            totals[event.name] = (count + 1, us + event.device_time)
            ran_us.append((event.time_range.start, event.time_range.end))
        elif "Launch" in event.name:
            num_launches += 1
        elif ("Synchronize" in event.name or event.name == "cudaMemcpy") and event.time_range.start < launched_us:
            waits[event.name] += 1
    kernels = {name: (count // PROFILED_STEPS, us / PROFILED_STEPS) for name, (count, us) in totals.items()}
    return Profile(
        step_ms,
        host_ms,
        kernels,
        dict(waits),
        _idle_us(ran_us) / PROFILED_STEPS / 1e3,
        num_launches // PROFILED_STEPS,
    )


def _launch_ms(steps: Decoding | Prefilling) -> float:
    """Of the host, while the device has nothing else queued."""
    began_s = time.perf_counter()
    steps.launch()
    launched_s = time.perf_counter()
    torch.cuda.synchronize()
    return (launched_s - began_s) * 1e3


def _idle_us(ran_us: list[tuple[float, float]]) -> float:
    """Of the time from the first beginning to the last end: what is in none of the spans."""
    idle_us, reached_us = 0.0, min(ran_us)[0]
    for begin_us, end_us in sorted(ran_us):
        idle_us += max(0.0, begin_us - reached_us)
        reached_us = max(reached_us, end_us)
    return idle_us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="scout-fp8")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--prefill", default="", help="instead of batches: tokens of steps of prompts, as 8192,16384")
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=24, help="lines of the table")
    parser.add_argument("--pipeline", default="{}", help="JSON: more pipeline keys")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = describe_model(Path(directory) / args.shape, args.shape, args.layers)
        keys = {
            "model": str(path), "load": "dummy", "routing": "uniform", "max_num_seqs": max(_batches(args)),
            "max_model_len": 4096, "kv_cache_bytes": 8 << 30,
            "max_num_batched_tokens": max(_prefills(args), default=2048),
        } | json.loads(args.pipeline)  # fmt: skip
        if args.gpus == 1:
            look(args, keys, 0, "")
        else:
            _look_at_unit(args, keys)


def _batches(args: argparse.Namespace) -> list[int]:
    return [int(b) for b in args.batches.split(",")]


def _prefills(args: argparse.Namespace) -> list[int]:
    return [int(tokens) for tokens in args.prefill.split(",") if tokens]


def _look_at_unit(args: argparse.Namespace, keys: dict[str, Any]) -> None:
    store, context = RendezvousStore(HOST), multiprocessing.get_context("spawn")
    store.start()
    members = [context.Process(target=look, args=(args, keys, i, store.endpoint)) for i in range(args.gpus)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    store.stop()
    if any(member.exitcode for member in members):
        raise SystemExit(f"members ended with {[member.exitcode for member in members]}")


def look(args: argparse.Namespace, keys: dict[str, Any], index: int, store: str) -> None:
    """Profiles all batches, in each process of a unit alike; the first prints."""
    began_s = time.perf_counter()
    pipeline = PipelineConfig.parse(keys)
    model: LocalModel | UnitMember
    if args.gpus == 1:
        model = LocalModel.load(pipeline, torch.device("cuda:0"))
    else:
        model = UnitMember(pipeline, index, args.gpus, store)
    if index == 0:
        print(f"{args.shape}, {args.layers} layers: ready after {time.perf_counter() - began_s:.1f} s", flush=True)
    for num_tokens in _prefills(args):
        seen = profile(Prefilling(model, num_tokens, args.context_tokens), args.steps)
        if index == 0:
            _show(seen, f"{num_tokens} tokens of prompts", args.kernels)
    for batch in _batches(args) if not args.prefill else []:
        seen = profile(Decoding(model, batch, args.context_tokens), args.steps)
        if index == 0:
            _show(seen, f"batch {batch}", args.kernels)


def _show(seen: Profile, what: str, num_lines: int) -> None:
    busy_us = sum(us for _, us in seen.kernels.values())
    print(f"\n{what}: {seen.step_ms:.3f} ms a step, kernels {busy_us / 1e3:.3f} ms")
    print(f"{seen.num_launches} launches take the host {seen.host_ms:.3f} ms; no kernel ran for {seen.idle_ms:.3f} ms")
    print(f"calls that make the host wait, in {PROFILED_STEPS} steps: {seen.waits or 'none'}")
    for name, (count, us) in sorted(seen.kernels.items(), key=lambda item: -item[1][1])[:num_lines]:
        print(f"{us:9.1f} us {count:5d} x  {name[:110]}", flush=True)


if __name__ == "__main__":
    main()
