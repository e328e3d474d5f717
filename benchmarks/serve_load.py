"""The served pipeline under load: real gRPC and HTTP clients in a closed loop at one concurrency after another, beside
the bare engine of the same configuration.

    python -m benchmarks.serve_load --engine --write serve-load                  # the demonstration model, as it is
    python -m benchmarks.serve_load --model shape:scout-fp8 --set load=dummy --set routing=uniform --engine
    python -m benchmarks.serve_load --grpc 10.0.0.1:9000 --http http://10.0.0.1:8000    # a service that runs already

Requests are greedy, with random prompts, and run to their full length. Service and engine never run at the same time.
What was measured is reported even where the run is broken off.
"""

import argparse
import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import httpx
import yaml

from benchmarks import plot, report
from benchmarks.client_processes import ENGINE, GRPC, HTTP, ClientProcesses, Target, default_num_processes
from benchmarks.clients import over_grpc, over_http
from benchmarks.load_figures import Figures, Level, Window, figures
from benchmarks.served import Served
from benchmarks.workload import EndlessItems
from protos import inference_pb2, inference_pb2_grpc

CpuSeconds = Callable[[], Counter[str]]  # of each part of a service, since it began
RATIO_STREAMS = 128  # the level at which the share of the engine's rate is kept with --add-ratio-to
BUSY_CLIENT = 0.8  # with more of a core, it may be a client process that is measured
PARTS = ("ingress", "router", "ranks", "HAProxy", "proxy", "Serve, Ray")
COLORS = {ENGINE: "#444", GRPC: "#b5522b", HTTP: "#3a6ea5"}
HEADER = ("streams", "path", "tokens/s", "of engine", "requests/s", "TTFT p50 ms", "TTFT p99 ms", "inter-token p50 ms",
          "inter-token p99 ms", "tokens per message", "requests", "failed")  # fmt: skip
NOTES = """
Closed loop: every stream sends its next request when the last one is whole. Figures are of the steady window after the
warm-up, and everything counts where it happened; percentiles are over all requests of the window, and of fewer than 100
the 99th is nearly the slowest. Inter-token latency is the gap between two messages of an answer, divided over the
tokens of the second; messages within 0.5 ms are one. TTFT runs from sending to the first token.
"""
ENGINE_NOTE = """The engine is the same router and ranks without Ray and Serve, measured after the service had ended;
the same client processes speak to its router.
"""


def main() -> None:
    args = arguments()
    found: list[Figures] = []
    try:
        with ClientProcesses(args.clients) as clients:
            measure_all(clients, args, found)
    finally:
        if found:
            publish(found, args)


def measure_all(clients: ClientProcesses, args: argparse.Namespace, found: list[Figures]) -> None:
    """Appends each level's figures to `found` as soon as it is over."""
    with service(args) as (targets, cpu_s):
        args.vocab = args.vocab or vocab_of(targets[0])
        for target in targets:
            first_requests(target, args)
            found += (measure(clients, target, level, cpu_s) for level in levels(args, target.path))
    if args.engine:
        with engine(args) as target:
            found += (measure(clients, target, level, Counter) for level in levels(args, ENGINE))


def publish(found: Sequence[Figures], args: argparse.Namespace) -> None:
    """Prints the report, and writes what --write and --add-ratio-to name."""
    text, ratio = render(found, args), grpc_ratio(found, RATIO_STREAMS)
    print(text)
    if args.write:
        report.write(args.write, text, {"levels": [dataclasses.asdict(f) for f in found], "commit": report.commit()})
        report.picture(args.write, picture(found))
    if args.add_ratio_to and ratio is not None:
        report.add(args.add_ratio_to, {f"grpc_ratio_{RATIO_STREAMS}": round(ratio, 3)})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as for `corral serve`: a directory, shape:NAME or demo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the pipeline")
    parser.add_argument("--front", default="haproxy", help="of `corral serve`")
    parser.add_argument("--grpc", default="", metavar="HOST:PORT", help="measure a service that runs already")
    parser.add_argument("--http", default="", metavar="URL", help="likewise")
    parser.add_argument("--streams", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--http-streams", default="", help="over HTTP only these of --streams")
    parser.add_argument("--prompt-tokens", type=lengths, default="1024", metavar="N", help="or LOW-HIGH for a mix")
    parser.add_argument("--output-tokens", type=lengths, default="128", metavar="N", help="likewise")
    parser.add_argument("--vocab", type=int, default=0, help="prompts are of ids below this; 0: all that the model has")
    parser.add_argument(
        "--warm-up-s", default="10", help="of each level, or one number per level: more streams take longer"
    )
    parser.add_argument("--duration-s", default="20", help="of each level's steady window, likewise")
    parser.add_argument("--clients", type=int, default=default_num_processes(), help="client processes")
    parser.add_argument("--engine", action="store_true", help="then measure the bare engine on the same machine")
    parser.add_argument("--where", default="", help="the hardware, for the report")
    parser.add_argument("--write", default="", metavar="NAME", help="under benchmarks/results")
    ratio_help = f"add gRPC's share of the engine's rate at {RATIO_STREAMS} streams to results/NAME.json"
    parser.add_argument("--add-ratio-to", default="", metavar="NAME", help=ratio_help)
    args = parser.parse_args()
    if args.engine and (args.grpc or args.http):
        parser.error("--engine needs a service that is started here, so that both have one configuration")
    if args.http and not args.grpc and not args.vocab:
        parser.error("over HTTP alone --vocab is needed")
    if args.add_ratio_to and not args.engine:
        parser.error("--add-ratio-to needs --engine")
    return args


def lengths(text: str) -> tuple[int, int]:
    """N as (N, N), LOW-HIGH as (LOW, HIGH)."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What --set says, as keys of the pipeline."""
    return {key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in args.set)}


@contextmanager
def service(args: argparse.Namespace) -> Iterator[tuple[list[Target], CpuSeconds]]:
    """Ways to a service and its processor time: of one that is started here, or of the one that `args` point at (no
    times then).
    """
    if args.grpc or args.http:
        named = [Target(path=GRPC, address=args.grpc)] if args.grpc else []
        named += [Target(path=HTTP, address=args.http, model=model_at(args.http))] if args.http else []
        yield named, Counter
        return
    flags = ["--front", args.front] + [part for setting in args.set for part in ("--set", setting)]
    with Served(args.model, flags) as here:
        print(f"the service was ready after {here.ready_s:.1f} s", flush=True)
        yield [Target(path=GRPC, address=here.grpc), Target(path=HTTP, address=here.url, model="bench")], here.cpu_s


def model_at(url: str) -> str:
    """The first model that a service lists."""
    return str(httpx.get(f"{url}/v1/models", timeout=30).raise_for_status().json()["data"][0]["id"])


def vocab_of(target: Target) -> int:
    with grpc.insecure_channel(target.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        return int(stub.GetModel(inference_pb2.GetModelRequest(), timeout=30).vocab_size)


def items_for(num_streams: int, args: argparse.Namespace) -> EndlessItems:
    return EndlessItems(
        num_streams=num_streams, prompt_tokens=args.prompt_tokens, output_tokens=args.output_tokens, vocab=args.vocab
    )


def first_requests(target: Target, args: argparse.Namespace) -> None:
    """What is compiled or connected at first use, is so here, however long it takes."""
    items = [items_for(1, args)[number] for number in range(2)]
    if target.path == GRPC:
        asyncio.run(over_grpc(target.address, items))
    else:
        asyncio.run(over_http(target.address, target.model, items))


def levels(args: argparse.Namespace, path: str) -> Iterator[Level]:
    """One after another; each begins when it is taken."""
    numbers = each(args.streams)
    wanted = each(args.http_streams) if path == HTTP and args.http_streams else numbers
    warm_ups_s, durations_s = each(args.warm_up_s), each(args.duration_s)
    if len(warm_ups_s) == 1:
        warm_ups_s *= len(numbers)
    if len(durations_s) == 1:
        durations_s *= len(numbers)
    for number, warm_up_s, duration_s in zip(numbers, warm_ups_s, durations_s, strict=True):
        if number in wanted:
            begin_s = time.perf_counter() + warm_up_s
            window = Window(begin_s=begin_s, end_s=begin_s + duration_s)
            yield Level(num_streams=int(number), items=items_for(int(number), args), window=window)


def each(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def measure(clients: ClientProcesses, target: Target, level: Level, cpu_s: CpuSeconds) -> Figures:
    """One level, printed as soon as it is over."""
    before, began_s = cpu_s(), time.perf_counter()
    answers, busiest = clients.run(target, level)
    took_s = time.perf_counter() - began_s
    cores = {part: (seconds - before[part]) / took_s for part, seconds in cpu_s().items()}
    found = dataclasses.replace(figures(target.path, level, answers, busiest), cores=cores)
    print(" | ".join(row(found, {})), found.problem, flush=True)
    return found


@contextmanager
def engine(args: argparse.Namespace) -> Iterator[Target]:
    """The router and ranks that the service had, without Ray and Serve. Has answered requests."""
    # Here, since client processes import this module too, and these import torch.
    from actors.checkpoint.shape_models import resolve_model_directory
    from benchmarks.engine import Engine
    from cluster.hardware import local_machines

    keys = settings(args)
    directory = resolve_model_directory(args.model, with_weights=keys.get("load") != "dummy")
    machines = local_machines(keys.get("device", "auto"))
    devices = [] if machines.is_cpu else [f"cuda:{i}" for i in range(machines.count)]
    with Engine(directory, machines, devices, **keys) as bare:
        bare.run([items_for(1, args)[number] for number in range(2)])
        yield Target(path=ENGINE, address=bare.endpoint)


def row(found: Figures, engine_rates: dict[int, float]) -> list[str]:
    """A line of the table; bold where requests failed."""
    rate, bare_rate = found.output_tokens_per_s, engine_rates.get(found.num_streams)
    latencies = (found.ttft_p50_ms, found.ttft_p99_ms, found.token_p50_ms, found.token_p99_ms, found.tokens_per_message)
    cells = [str(found.num_streams), found.path, f"{rate:,.0f}", f"{rate / bare_rate:.2f}" if bare_rate else "-"]
    cells += [f"{found.requests_per_s:.2f}", *("-" if value is None else f"{value:,.2f}" for value in latencies)]
    cells += [str(found.num_requests), str(found.num_failures)]
    return [f"**{cell}**" for cell in cells] if found.num_failures else cells


def grpc_ratio(found: Sequence[Figures], num_streams: int) -> float | None:
    """gRPC's share of the engine's rate at a level; None where one of them was not measured there."""
    rates = {f.path: f.output_tokens_per_s for f in found if f.num_streams == num_streams and not f.num_failures}
    return rates[GRPC] / rates[ENGINE] if rates.get(GRPC) and rates.get(ENGINE) else None


def render(found: Sequence[Figures], args: argparse.Namespace) -> str:
    rates = {f.num_streams: f.output_tokens_per_s for f in found if f.path == ENGINE}
    in_order = sorted(found, key=lambda f: f.num_streams)  # paths stay in the order in which they ran
    lines = [report.preamble("The served pipeline under load", where_of(args)), workload_of(args)]
    lines += [report.table(HEADER, [row(f, rates) for f in in_order]), NOTES]
    lines += [ENGINE_NOTE] if rates else []
    lines += processor_time(in_order)
    lines += remarks(in_order)
    return "\n".join(lines)


def processor_time(found: Sequence[Figures]) -> Iterator[str]:
    """Which process would be the next limit."""
    known = [f for f in found if f.cores]
    if not known:
        return
    parts = [part for part in PARTS if any(part in f.cores for f in known)]
    yield "Cores that each part of the service took, warm-up included (all processes of a part together):\n"
    yield report.table(
        ("streams", "path", *parts),
        [(f.num_streams, f.path, *(f"{f.cores.get(part, 0.0):.2f}" for part in parts)) for f in known],
    )
    yield ""


def where_of(args: argparse.Namespace) -> str:
    from cluster.hardware import local_machines  # here, as in engine()

    if args.where or args.grpc or args.http:
        return args.where or f"a service that ran already; clients on {report.hardware()}"
    machines = local_machines(settings(args).get("device", "auto"))
    return report.hardware() if machines.is_cpu else f"{machines} and {report.hardware()}"


def workload_of(args: argparse.Namespace) -> str:
    prompt, output = ("-".join(map(str, sorted(set(size)))) for size in (args.prompt_tokens, args.output_tokens))
    return (
        f"Prompts of {prompt} tokens, outputs of {output}, greedy; {args.warm_up_s} s of warm-up and "
        f"{args.duration_s} s of steady load at each level; client processes: {args.clients}.\n"
    )


def remarks(found: Sequence[Figures]) -> Iterator[str]:
    """What must be known to believe a figure."""
    for f in found:
        where = f"{f.path} at {f.num_streams}"
        if f.num_failures:
            yield f"- {where}: {f.num_failures} requests failed and do not count, one of them so: {f.problem}"
        if f.num_cold:
            yield f"- {where}: the warm-up was too short; {f.num_cold} streams were in their first answer after it"
        if f.busiest_client > BUSY_CLIENT:
            yield f"- {where}: a client process took {f.busiest_client:.0%} of a core and may have been the limit"


def picture(found: Sequence[Figures]) -> str:
    """Rate and latencies over concurrency for every path; 99th percentiles dashed, levels with failures crossed."""

    def lines(name: str, dashed: bool = False) -> list[plot.Line]:
        return [
            plot.Line(
                label=path,
                color=COLORS[path],
                dashed=dashed,
                points=[(f.num_streams, getattr(f, name)) for f in found if f.path == path],
                crossed=[f.num_streams for f in found if f.path == path and f.num_failures],
            )
            for path in dict.fromkeys(f.path for f in found)
        ]

    panels = [
        plot.Panel(title="output tokens/s", lines=lines("output_tokens_per_s")),
        plot.Panel(title="inter-token ms", lines=lines("token_p50_ms") + lines("token_p99_ms", True), is_log=True),
        plot.Panel(title="first token ms", lines=lines("ttft_p50_ms") + lines("ttft_p99_ms", True), is_log=True),
    ]
    return plot.over_doublings(
        panels, "streams at once", "dashed: 99th percentile; others: median; crossed: requests failed"
    )


if __name__ == "__main__":
    main()
