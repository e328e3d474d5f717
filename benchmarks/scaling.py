"""What growing, shrinking and rebalancing cost while requests run: real router, real ranks as processes, no Serve.

python -m benchmarks.scaling     # about six minutes on 2 cores; writes results/scaling.md and scaling.json

Every answer is compared with a run in which nothing changed, token for token.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tiny, larger = (ensure_shape_model(shape, Path(scratch)) for shape in ("tiny", "bench-maverick"))
        results = {
            "skew_tiny_3_expert_ranks": rebalance(make_skewed(tiny, Path(scratch) / "skewed-tiny", 2), 3, 6),
            "skew_bench_2_expert_ranks": rebalance(make_skewed(larger, Path(scratch) / "skewed", 8), 2, 20),
            "grow_and_shrink": grow_and_shrink(tiny, args.changes),
        }
    print(json.dumps(results, indent=2))
    text = report.preamble("Scaling while requests run") + f"\n{STREAMS} streams, fp32.\n"
    for name, values in results.items():
        text += f"\n## {name.replace('_', ' ')}\n\n" + report.table(("", ""), list(values.items())) + "\n"
    report.write("scaling", text, results)


if __name__ == "__main__":
    main()
