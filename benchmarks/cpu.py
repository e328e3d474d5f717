"""Everything that is promised of the CPU pipeline, in one run: beside transformers, and served beside bare.

python -m benchmarks.cpu            # about ten minutes on 2 cores; writes results/cpu.md and cpu.json
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.checkpoint.shape_models import ensure_shape_model
from benchmarks import report
from benchmarks.clients import over_grpc, over_http
from benchmarks.engine import Engine, Trace, tokens_per_s
from benchmarks.served import Served
from benchmarks.workload import mixed, single_stream

SHAPE = "bench-maverick"
VOCAB = 8000  # ids of text in that shape
CONCURRENCY = (1, 4, 16, 64)
NUM_MOE_LAYERS = 6  # of that shape
SETTLE_S = 5.0


def peer(directory: Path, threads: int) -> dict[str, Any]:
    """transformers on the same checkpoint, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peer_transformers", str(directory), "--threads", str(threads)]
    done = subprocess.run([*command, "--vocab", str(VOCAB)], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def stream_ms(engine: Engine, rounds: int) -> dict[str, float]:
    """Time per token and to the first one of a lone request: the best of some rounds, as for the peer."""
    engine.run([single_stream(VOCAB)])
    traces = [engine.run([single_stream(VOCAB)])[0] for _ in range(rounds)]
    per_token = min((t.token_s[-1] - t.token_s[0]) / (len(t.token_s) - 1) for t in traces)
    return {"ms_per_token": per_token * 1e3, "ttft_ms": min(t.ttft_s for t in traces) * 1e3}


def load(run: Callable[[Sequence[Any]], list[Trace]], concurrency: int, rounds: int) -> dict[str, float]:
    """Rate and latencies at one concurrency: medians over rounds of the rate, over all requests of the latencies."""
    rates, ttfts, gaps = [], [], []
    for _ in range(rounds):
        items = mixed(concurrency, VOCAB)
        traces = run(items)
        for trace, item in zip(traces, items, strict=True):
            assert len(trace.token_ids) == item.num_outputs, trace.problem
        rates.append(tokens_per_s(traces))
        ttfts += [trace.ttft_s for trace in traces]
        gaps += [gap for trace in traces for gap in trace.gaps_s]
    return {
        "tokens_per_s": statistics.median(rates),
        "ttft_p50_ms": statistics.median(ttfts) * 1e3,
        "gap_p50_ms": statistics.median(gaps) * 1e3,
        "gap_p99_ms": statistics.quantiles(gaps, n=100)[98] * 1e3,
    }


class Bench(Served):
    """The service with the clients that this benchmark uses."""

    def run_grpc(self, items: Sequence[Any]) -> list[Trace]:
        return asyncio.run(over_grpc(self.grpc, items))

    def run_http(self, items: Sequence[Any]) -> list[Trace]:
        return asyncio.run(over_http(self.url, "bench", items))


def served_ratios(engine: Engine, served: Bench, rounds: int) -> dict[str, Any]:
    """Rates at 16 streams, bare and served in turn, so that all see the same machine."""
    runs = {"bare": engine.run, "grpc": served.run_grpc, "http": served.run_http}
    for run in runs.values():
        run(mixed(16, VOCAB))
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rates[name].append(tokens_per_s(run(mixed(16, VOCAB))))
    bare = rates["bare"]
    return {
        "rates": {name: statistics.median(values) for name, values in rates.items()},
        "grpc_ratio": statistics.median(a / b for a, b in zip(rates["grpc"], bare, strict=True)),
        "http_ratio": statistics.median(a / b for a, b in zip(rates["http"], bare, strict=True)),
    }


def measure(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything, one thing at a time. Keys as `render` and `summary` use them."""
    keys = {"dtype": args.dtype, "max_model_len": 4096}
    found: dict[str, Any] = {"peer": peer(directory, args.threads)}
    with Engine(directory, layout="single", threads_per_rank=args.threads, **keys) as engine:
        found["stream"] = stream_ms(engine, args.rounds)
        found["load"] = {c: load(engine.run, c, 2 if c == 64 else args.rounds) for c in CONCURRENCY}
        flags = ["--layout", "single", "--threads-per-rank", str(args.threads), "--dtype", args.dtype]
        with Bench(directory, [*flags, "--max-model-len", "4096"]) as served:
            time.sleep(SETTLE_S)
            found["memory_mib"], found["ready_s"] = served.memory_mib(), served.ready_s
            found["front"] = served_ratios(engine, served, args.rounds)
    for name, layout in (("single_1t", "single"), ("split_1t", "disaggregated")):
        with Engine(directory, layout=layout, threads_per_rank=1, **keys) as engine:
            found[name] = stream_ms(engine, args.rounds)
    return found


def best_of_peer(found: dict[str, Any], concurrency: int) -> float:
    """The peer's best rate: of its static batches, and of its continuous batching where that ran."""
    rates = [
        found["peer"]["static"][str(concurrency)]["tokens_per_s"],
        found["peer"]["continuous"].get(str(concurrency)),
    ]
    return max(rate for rate in rates if isinstance(rate, float))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "stream_ratio": found["peer"]["ms_per_token"] / found["stream"]["ms_per_token"],
        "batch16_ratio": found["load"][16]["tokens_per_s"] / best_of_peer(found, 16),
        "grpc_ratio": found["front"]["grpc_ratio"],
        "http_ratio": found["front"]["http_ratio"],
        "ready_s": found["ready_s"],
        "commit": report.commit(),
    }


def against_peer(found: dict[str, Any]) -> str:
    theirs, ours = found["peer"], found["stream"]
    rows = [
        [f"one stream, {text}", f"{theirs[key]:.2f}", f"{ours[key]:.2f}", f"{theirs[key] / ours[key]:.2f}"]
        for text, key in (("ms per token", "ms_per_token"), ("ms to the first token (prompt of 128)", "ttft_ms"))
    ]
    for c in CONCURRENCY:
        static, rate = theirs["static"][str(c)], found["load"][c]["tokens_per_s"]
        theirs_text = f"{static['tokens_per_s']:.0f} (static batches of {static['batch']})"
        rows.append([f"{c} mixed, tokens/s", theirs_text, f"{rate:.0f}", f"{rate / best_of_peer(found, c):.2f}"])
    return report.table(["", "transformers generate", "Corral engine", "ratio"], rows)


def render(found: dict[str, Any], args: argparse.Namespace) -> str:
    columns = ("tokens_per_s", "ttft_p50_ms", "gap_p50_ms", "gap_p99_ms")
    latencies = [[c, *(f"{found['load'][c][key]:.1f}" for key in columns)] for c in CONCURRENCY]
    front = found["front"]
    served = [["bare engine loop", f"{front['rates']['bare']:.0f}", "1"]]
    served += [
        [f"{n}, HAProxy front", f"{front['rates'][n]:.0f}", f"{front[n + '_ratio']:.2f}"] for n in ("grpc", "http")
    ]
    single_ms, split_ms = found["single_1t"]["ms_per_token"], found["split_1t"]["ms_per_token"]
    parts = [
        report.preamble("The CPU pipeline beside transformers, and served beside bare"),
        f"Shape {SHAPE} (100 M parameters, 27 M active), {args.dtype}, {args.threads} threads for each of the two.\n",
        against_peer(found),
        f"\ntransformers' continuous batching, 16 requests: {found['peer']['continuous']['16']}\n",
        report.table(["concurrent", "tokens/s", "TTFT p50 ms", "inter-token p50 ms", "p99 ms"], latencies) + "\n",
        report.table(["16 streams", "tokens/s", "of bare"], served),
        f"\nReady to answer {found['ready_s']:.1f} s after `corral serve` is typed. Idle memory of the local stack: "
        f"{found['memory_mib']:.0f} MiB (proportional set size of all its processes).\n",
        f"1A+1E beside single, one thread per rank, one stream: {split_ms:.2f} and {single_ms:.2f} ms per token, "
        f"{(split_ms - single_ms) / NUM_MOE_LAYERS * 1e3:+.0f} us per MoE layer.",
    ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="of the peer and of a single rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    directory = ensure_shape_model(SHAPE, Path(tempfile.gettempdir()) / "corral-bench")
    found = measure(directory, args)
    text = render(found, args)
    report.write("cpu", text, summary(found))
    print(text)


if __name__ == "__main__":
    main()
