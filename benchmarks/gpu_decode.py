"""Decode and prefill speed of the engine on GPUs: the real router and rank processes, random weights of full size.

Time per output token is what a client of the router sees between tokens, while all requests of a batch decode; prompts
are random, greedy, routing uniform. The floor is bytes over bandwidth; `--peer` figures are printed beside ours.

    python -m benchmarks.gpu_decode --shape scout-fp8 --gpus 1 --batches 1,8,32 --write scout-1xh200
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.checkpoint.config import read_model_config
from actors.checkpoint.make_model import write_description
from actors.checkpoint.shapes import named_shape
from actors.config import PipelineConfig
from benchmarks import report
from benchmarks.engine import Engine
from benchmarks.trace import Trace
from benchmarks.workload import Item
from cluster.floors import Split, decode, step_floor_s
from cluster.footprint import Footprint, Precision
from cluster.hardware import parse_machines


def describe_model(directory: Path, shape: str, num_layers: int) -> Path:
    """Writes config and tokenizer of a named shape, cut to `num_layers` if that is not 0; no weights."""
    model_shape, experts = named_shape(shape)
    if num_layers:
        model_shape = replace(model_shape, num_layers=num_layers)
    write_description(directory, model_shape, experts=experts)
    return directory


def prompts(num: int, num_tokens: int, vocab: int, num_outputs: int) -> list[Item]:
    rng = random.Random(num)
    return [Item([rng.randrange(vocab) for _ in range(num_tokens)], num_outputs) for _ in range(num)]


def time_per_token_ms(traces: list[Trace]) -> float:
    """Median gap between tokens while all requests were decoding."""
    begin_s = max(trace.token_s[0] for trace in traces)
    end_s = min(trace.token_s[-1] for trace in traces)
    gaps = [
        later - earlier
        for trace in traces
        for earlier, later in zip(trace.token_s, trace.token_s[1:], strict=False)
        if begin_s <= earlier and later <= end_s
    ]
    total_s = sum(gaps)
    return 1e3 * total_s / len(gaps) if gaps else float("nan")


def prefill_tokens_per_s(traces: list[Trace], prompt_tokens: int) -> float:
    return len(traces) * prompt_tokens / (max(t.token_s[0] for t in traces) - min(t.sent_s for t in traces))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="scout-fp8")
    parser.add_argument("--layers", type=int, default=0, help="cut the model to this many layers")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=160)
    parser.add_argument("--peer", default="{}", help='JSON: {"1": ms, ...}')
    parser.add_argument("--pipeline", default="{}", help="JSON: more pipeline keys")
    parser.add_argument("--prefill", type=int, default=0, help="also time this many prompts at once")
    parser.add_argument("--logs", type=Path, help="a folder for ranks' logs: among others, what their start took")
    parser.add_argument("--write", default="", help="name under benchmarks/results")
    args = parser.parse_args()
    batches, peer = [int(b) for b in args.batches.split(",")], json.loads(args.peer)
    with tempfile.TemporaryDirectory() as directory:
        model = describe_model(Path(directory) / args.shape, args.shape, args.layers)
        measure(args, model, batches, peer)


def measure(args: argparse.Namespace, model: Path, batches: list[int], peer: dict[str, float]) -> None:
    config = read_model_config(model)
    began_s = time.monotonic()
    if args.logs is not None:
        args.logs.mkdir(parents=True, exist_ok=True)
    machines, devices = parse_machines(f"{args.gpus}x{args.gpu}"), [f"cuda:{i}" for i in range(args.gpus)]
    with Engine(model, machines, devices, logs=args.logs, **pipeline_keys(args, batches)) as engine:
        start_s = time.monotonic() - began_s
        print(f"ready after {start_s:.1f} s: {engine.pipeline.layout}", flush=True)
        engine.run(prompts(2, 64, config.vocab_size, 8))  # what is compiled at first use, is compiled here
        footprint = Footprint(model=config, precision=Precision.of(config))
        rows, values = [], {}
        for batch in batches:
            traces = engine.run(prompts(batch, args.prompt_tokens, config.vocab_size, args.output_tokens))
            if problems := [trace.problem for trace in traces if trace.problem]:
                raise RuntimeError(problems[0])
            tpot_ms, first_ms = time_per_token_ms(traces), 1e3 * statistics.median(trace.ttft_s for trace in traces)
            step = decode(batch, args.prompt_tokens + args.output_tokens // 2)
            floor_ms = 1e3 * step_floor_s(footprint, machines, split_of(engine.pipeline, batch), step)
            rate, peer_ms = batch / tpot_ms * 1e3, peer.get(str(batch))
            rows.append((batch, f"{tpot_ms:.2f}", f"{rate:,.0f}", f"{floor_ms:.2f}", peer_ms or "-", f"{first_ms:.0f}"))
            values[str(batch)] = round(tpot_ms, 3)
            print(rows[-1], flush=True)
        prefill = 0.0
        if args.prefill:
            traces = engine.run(prompts(args.prefill, args.prompt_tokens, config.vocab_size, 1))
            prefill = prefill_tokens_per_s(traces, args.prompt_tokens)
    text = report.table(("batch", "ms per token", "tokens/s", "floor ms", "peer ms", "median first token ms"), rows)
    lines = [report.preamble(f"Decode speed of {args.shape}", f"{args.gpus} x {args.gpu}"), text]
    lines.append(f"\nStart to ready: {start_s:.1f} s.")
    if prefill:
        lines.append(f"Prefill of {args.prefill} prompts of {args.prompt_tokens} tokens: {prefill:,.0f} tokens/s.")
    print("\n".join(lines[1:]))
    if args.write:
        results = {"tpot_ms": values, "prefill_tokens_per_s": round(prefill), "start_s": round(start_s, 1)}
        report.write(args.write, "\n".join(lines), results | {"commit": report.commit()})


def pipeline_keys(args: argparse.Namespace, batches: list[int]) -> dict[str, Any]:
    """Of a pipeline with random weights that takes the largest batch at once."""
    more: dict[str, Any] = json.loads(args.pipeline)
    return {
        "load": "dummy", "routing": "uniform", "max_num_batched_tokens": 8192, "max_num_seqs": max(batches),
        "max_model_len": args.prompt_tokens + args.output_tokens + 64, "step_timeout_s": 60.0,
    } | more  # fmt: skip


def split_of(pipeline: PipelineConfig, batch: int) -> Split:
    """How a decode step of `batch` requests is divided."""
    is_in_halves = 0 < pipeline.most_whole_rows < -(-batch // pipeline.attention_ranks)
    return Split(
        layout=pipeline.layout, attention_ranks=pipeline.attention_ranks, expert_ranks=pipeline.expert_ranks,
        attention_tp=pipeline.attention_tp, expert_tp=pipeline.expert_tp, micro_batches=2 if is_in_halves else 1,
    )  # fmt: skip


if __name__ == "__main__":
    main()
