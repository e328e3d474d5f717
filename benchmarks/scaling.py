"""What growing, shrinking and rebalancing cost while requests run: real router, real ranks as processes, no Serve.

python -m benchmarks.scaling                       # about eight minutes on 2 cores; writes results/scaling.md and .json
python -m benchmarks.scaling --only attention      # parts with that in their name; writes results/scaling-attention.md

Every answer is compared with a run in which nothing changed, token for token.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch

from actors.checkpoint.shape_models import ensure_shape_model
from actors.config import ScalingConfig
from benchmarks import report
from benchmarks.edges import CloseCalls
from benchmarks.engine import Engine, Trace
from benchmarks.workload import Item

STREAMS = 32
VOCAB = 250
NUM_ITEMS = 64
NUM_CHANGES = 50
ATTENTION_RANKS = 2
HOT_FACTOR = 4.0  # by which the router rows of hot experts are scaled up
MEASURE_S = 20.0
SEATS = 16  # requests that an attention rank runs at once, where attention ranks come and go
CHANGE_TIMEOUT_S = 60.0

Done = list[tuple[int, Trace]]


def workload(seed: int = 5) -> list[Item]:
    rng = random.Random(seed)
    return [
        Item([rng.randrange(VOCAB) for _ in range(rng.randint(8, 64))], rng.randint(60, 160)) for _ in range(NUM_ITEMS)
    ]


def judge(directory: Path, items: list[Item], expected: Sequence[list[int]], done: Done) -> dict[str, int]:
    """`different` are those that no close call explains."""
    close_calls = CloseCalls(directory)
    others = [(n, t.token_ids) for n, t in done if not t.problem and t.token_ids != expected[n]]
    explained = sum(close_calls.explains(items[n], expected[n], token_ids, None) for n, token_ids in others)
    return {
        "requests": len(done),
        "failed": sum(bool(trace.problem) for _, trace in done),
        "different": len(others) - explained,
        "close_calls": explained,
    }


def successes(engine: Engine) -> list[dict[str, Any]]:
    return [change for change in engine.router.snapshot.get("changes", []) if not change["problem"]]


class Conductor:
    """Tells the scaler what to want next, once the last wish has come true; `goes_on` is polled by the load."""

    def __init__(self, engine: Engine, wishes: Sequence[Callable[[], None]], is_true: Callable[[int], bool]) -> None:
        self._engine = engine
        self._wishes = wishes
        self._is_true = is_true
        self._turn = -1
        self._since_s = time.monotonic()
        self.changes: list[dict[str, Any]] = []
        self.levels: list[tuple[float, int, int]] = []  # MiB and descriptors of the router's process and of rank 0's
        self._rank = psutil.Process(engine.fleet.processes[0].pid)
        self._own = psutil.Process()

    def goes_on(self) -> bool:
        now_s = time.monotonic()
        if len(self.changes) == len(self._wishes):
            return False
        if self._turn >= 0 and not self._is_true(self._turn):
            if now_s - self._since_s > CHANGE_TIMEOUT_S:
                raise TimeoutError(f"wish {self._turn} did not come true: {self._engine.status().detail}")
            return True
        if self._turn >= 0:
            self.changes.append(successes(self._engine)[-1])
            memory_mib = self._rank.memory_info().rss / 2**20
            self.levels.append((memory_mib, self._rank.num_fds(), self._own.num_fds()))
            print(f"\r{self._turn + 1} of {len(self._wishes)} changes", end="", flush=True)
        if len(self.changes) == len(self._wishes):
            return False
        self._turn += 1
        self._since_s = now_s
        self._wishes[self._turn]()
        return True


def grow_and_shrink(directory: Path, num_changes: int) -> dict[str, Any]:
    """An expert rank more, an expert rank less, and so on, under load."""
    bounds = [ScalingConfig(min_experts=n, max_experts=n, rebalance=False) for n in (2, 3)]
    with Engine(directory, layout="disaggregated", attention_ranks=ATTENTION_RANKS, expert_ranks=2, expert_slots=6,
                threads_per_rank=1, scaling={"rebalance": False}) as engine:  # fmt: skip
        items = workload()
        expected = [trace.token_ids for trace in engine.run(items)]

        def has(turn: int) -> bool:
            snapshot = engine.router.snapshot
            experts = [rank for rank in snapshot["ranks"] if "expert" in rank["roles"]]
            return snapshot["serving"] and not snapshot["changing"] and len(experts) == (3 if turn % 2 == 0 else 2)

        wishes = [lambda n=turn: engine.scaler.set_bounds(bounds[1 - n % 2]) for turn in range(num_changes)]
        conductor = Conductor(engine, wishes, has)
        done = engine.run_closed_loop(items, STREAMS, conductor.goes_on)
        print()
        pauses_ms = sorted(change["pause_s"] * 1e3 for change in conductor.changes)
        gaps_ms = sorted(gap * 1e3 for _, trace in done for gap in trace.gaps_s)
        quarter = max(1, len(conductor.levels) // 4)
        # Of the same kind of change: after each removal, the first quarter beside the last.
        settled = conductor.levels[1::2]
        early, late = settled[:quarter], settled[-quarter:]
        return {
            **judge(directory, items, expected, done),
            "changes": len(conductor.changes),
            "pause_p50_ms": round(statistics.median(pauses_ms), 1),
            "pause_max_ms": round(pauses_ms[-1], 1),
            "gap_p50_ms": round(statistics.median(gaps_ms), 1),
            "gap_max_ms": round(gaps_ms[-1], 1),
            "add_took_p50_s": round(statistics.median(c["took_s"] for c in conductor.changes[::2]), 2),
            "remove_took_p50_s": round(statistics.median(c["took_s"] for c in conductor.changes[1::2]), 2),
            "rank_memory_mib_first_last": [round(statistics.median(x[0] for x in part), 1) for part in (early, late)],
            "rank_descriptors_first_last": [statistics.median(x[1] for x in part) for part in (early, late)],
            "router_descriptors_first_last": [statistics.median(x[2] for x in part) for part in (early, late)],
        }


@dataclass(slots=True)
class Wave:
    """One stretch of load: what came of it, and how long until there were as many attention ranks as it calls for."""

    done: Done
    tokens_per_s: float
    arrived_s: float


def attention_wave(engine: Engine, items: list[Item], streams: int, wanted: int) -> Wave:
    """`streams` clients until `wanted` attention ranks serve, and for MEASURE_S after that."""
    began_s = time.perf_counter()
    arrived_s: list[float] = []

    def goes_on() -> bool:
        now_s = time.perf_counter()
        if not arrived_s and num_attention(engine) == wanted:
            arrived_s.append(now_s - began_s)
        if not arrived_s and now_s - began_s > CHANGE_TIMEOUT_S:
            raise TimeoutError(f"{wanted} attention ranks were expected: {engine.status().detail}")
        return not arrived_s or now_s - began_s < arrived_s[0] + MEASURE_S

    done = engine.run_closed_loop(items, streams, goes_on)
    settled_s = began_s + arrived_s[0]
    tokens = sum(0 < token_s - settled_s < MEASURE_S for _, trace in done for token_s in trace.token_s)
    return Wave(done, tokens / MEASURE_S, arrived_s[0])


def num_attention(engine: Engine) -> int:
    return sum("attention" in rank["roles"] for rank in engine.router.snapshot["ranks"])


def follow_the_load(directory: Path) -> dict[str, Any]:
    """Between one and two attention ranks, with few clients, then many, then few: nobody says when."""
    scaling = {"min_attention": 1, "max_attention": 2, "upscale_delay_s": 2.0, "downscale_delay_s": 4.0,
               "rebalance": False}  # fmt: skip
    with Engine(directory, layout="disaggregated", attention_ranks=1, expert_ranks=2, threads_per_rank=1,
                max_num_seqs=SEATS, scaling=scaling) as engine:  # fmt: skip
        items = workload()
        expected = [trace.token_ids for trace in engine.run(items[:SEATS]) + engine.run(items[SEATS:])]
        while num_attention(engine) > 1:  # the queue of those who were asked at once may have brought a second one
            engine.status()  # which says that we live
            time.sleep(0.5)
        few, many, few_again = (attention_wave(engine, items, streams, wanted)
                                for streams, wanted in ((SEATS // 4, 1), (STREAMS, 2), (SEATS // 4, 1)))  # fmt: skip
        changes = [change for change in successes(engine) if "attention rank" in change["why"]][-2:]
        waits_ms = sorted((t.ttft_s * 1e3 for _, t in many.done if not t.problem))
        return {
            **judge(directory, items, expected, few.done + many.done + few_again.done),
            "seats_per_rank": SEATS,
            "streams": [SEATS // 4, STREAMS, SEATS // 4],
            "second_rank_after_s": round(many.arrived_s, 1),
            "gone_again_after_s": round(few_again.arrived_s, 1),
            "why": [change["why"] for change in changes],
            "pause_ms": [round(change["pause_s"] * 1e3, 1) for change in changes],
            "tokens_per_s": [round(wave.tokens_per_s) for wave in (few, many, few_again)],
            "first_token_p50_ms_of_many": round(statistics.median(waits_ms)),
            "gap_max_ms": round(max(gap for w in (many, few_again) for _, t in w.done for gap in t.gaps_s) * 1e3, 1),
        }


def make_skewed(directory: Path, target: Path, num_hot: int) -> Path:
    """The checkpoint with its first router rows scaled up: those experts win most tokens."""
    target.mkdir()
    for file in directory.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
            continue
        tensors = safetensors.torch.load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("router.weight"):
                tensor[:num_hot] *= HOT_FACTOR
        safetensors.torch.save_file(tensors, target / file.name, metadata={"format": "pt"})
    return target


def max_over_mean(snapshot: dict[str, Any]) -> float:
    """Tokens of the busiest expert rank over the mean: layer by layer, as ranks pass through them, and then summed."""
    experts = [rank for rank in snapshot["ranks"] if "expert" in rank["roles"]]
    busiest = total = 0.0
    for layer, tokens in snapshot["expert_tokens"].items():
        holders = [sum(e in rank["slots"][layer] for rank in experts) for e in range(len(tokens))]
        loads = [sum(tokens[e] / holders[e] for e in rank["slots"][layer] if e >= 0) for rank in experts]
        busiest, total = busiest + max(loads), total + sum(loads)
    return busiest / (total / len(experts))


def rebalance(directory: Path, expert_ranks: int, expert_slots: int) -> dict[str, Any]:
    """A skewed model: before, then rebalanced while it serves, then after."""
    frozen = {"rebalance": False}
    eager = ScalingConfig(rebalance_interval_s=2.0, rebalance_gain=0.05)
    with Engine(
        directory, layout="disaggregated", attention_ranks=1, expert_ranks=expert_ranks, expert_slots=expert_slots,
        threads_per_rank=1, max_model_len=1024, scaling=frozen,
    ) as engine:  # fmt: skip
        items = workload()
        expected = [trace.token_ids for trace in engine.run(items)]
        parts: dict[str, Done] = {}
        ratios: dict[str, float] = {}
        rates: dict[str, float] = {}
        for name in ("before", "while it changes", "after"):
            if name == "while it changes":
                engine.membership.apply(eager)
            ends_s = time.monotonic() + MEASURE_S
            began_s = time.perf_counter()
            parts[name] = engine.run_closed_loop(items, STREAMS, lambda ends_s=ends_s: time.monotonic() < ends_s)
            tokens = sum(len(trace.token_ids) for _, trace in parts[name])
            ratios[name] = max_over_mean(engine.router.snapshot)
            rate = tokens / (time.perf_counter() - began_s)
            print(f"{name}: max/mean {ratios[name]:.2f}, {rate:.0f} tokens/s", flush=True)
            rates[name] = rate
        changes = [change for change in successes(engine) if change["why"] != "first start"]
        done = [entry for name in ("before", "while it changes", "after") for entry in parts[name]]
        return {
            **judge(directory, items, expected, done),
            "max_over_mean_before": round(ratios["before"], 2),
            "max_over_mean_after": round(ratios["after"], 2),
            "tokens_per_s_before": round(rates["before"]),
            "tokens_per_s_after": round(rates["after"]),
            "changes": len(changes),
            "pause_max_ms": round(max((change["pause_s"] for change in changes), default=0.0) * 1e3, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=NUM_CHANGES)
    parser.add_argument("--only", default="", help="parts that have this in their name, into results of that name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tiny = ensure_shape_model("tiny", Path(scratch))
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "skew_tiny_3_expert_ranks": lambda: rebalance(make_skewed(tiny, Path(scratch) / "skewed-tiny", 2), 3, 6),
            "skew_bench_2_expert_ranks": lambda: rebalance(skewed_larger(Path(scratch)), 2, 20),
            "grow_and_shrink": lambda: grow_and_shrink(tiny, args.changes),
            "attention_follows_the_load": lambda: follow_the_load(tiny),
        }
        results = {name: measure() for name, measure in parts.items() if args.only in name}
    print(json.dumps(results, indent=2))
    text = report.preamble("Scaling while requests run") + f"\n{STREAMS} streams, fp32.\n"
    for name, values in results.items():
        text += f"\n## {name.replace('_', ' ')}\n\n" + report.table(("", ""), list(values.items())) + "\n"
    report.write("-".join(["scaling", *filter(None, [args.only])]), text, results)


def skewed_larger(scratch: Path) -> Path:
    return make_skewed(ensure_shape_model("bench-maverick", scratch), scratch / "skewed", 8)


if __name__ == "__main__":
    main()
