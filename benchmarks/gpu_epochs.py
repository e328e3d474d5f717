"""Growth and losses while streams decode on the GPUs of one host: how long they stand still, and what ranks keep.

Real router and rank processes, greedy. Weights are random, made on the device; with `--exact` they are a checkpoint's,
in float32, and every answer must be that of a run in which nothing happened, but for close calls (benchmarks/edges.py).
In 16 bits sums round differently in other company, so what differs there is only counted.

    python -m benchmarks.gpu_epochs --gpus 4 --write gpu-epochs
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.checkpoint.shape_models import ensure_shape_model
from actors.config import ScalingConfig
from benchmarks import report
from benchmarks.edges import CloseCalls
from benchmarks.engine import Engine
from benchmarks.gpu_decode import describe_model
from benchmarks.trace import Trace
from benchmarks.workload import Item
from cluster.hardware import parse_machines

STREAMS = 32
QUIET_S = 1.5  # of load before an event, for the usual gaps, and after it
EVENT_TIMEOUT_S = 60.0
STACKS_AFTER_S = 5.0  # without steps: ranks are asked what they are doing, which may end them
CAPTURED = "a step of"  # how a rank's log says that it captured a graph
VOCAB = 500

Change = dict[str, Any]
Explains = Callable[[Item, list[int], list[int]], bool]
"""Whether it was a close call that an answer differs from what was expected."""


@dataclass(slots=True, kw_only=True)
class Event:
    """Something that is done to a pipeline, and how one sees that it is over."""

    name: str
    begin: Callable[[Engine], None]
    is_over: Callable[[Engine], bool]
    target_s: float
    began_s: float = 0.0  # of time.monotonic
    over_s: float = 0.0
    captures: dict[str, int] = field(default_factory=dict)  # by rank's log, before it
    later_captures: dict[str, int] = field(default_factory=dict)  # until the next event


def workload(prompt_tokens: tuple[int, int], output_tokens: tuple[int, int]) -> list[Item]:
    rng = random.Random(5)
    return [
        Item([rng.randrange(VOCAB) for _ in range(rng.randint(*prompt_tokens))], rng.randint(*output_tokens))
        for _ in range(2 * STREAMS)
    ]


def ranks_of(engine: Engine, role: str) -> list[int]:
    return [entry["rank"] for entry in engine.router.snapshot.get("ranks", []) if role in entry["roles"]]


def is_whole(engine: Engine, num_experts: int, without: int = -1) -> bool:
    snapshot = engine.router.snapshot
    ranks = ranks_of(engine, "expert")
    is_settled = snapshot.get("serving", False) and not snapshot["changing"]
    return is_settled and len(ranks) == num_experts and without not in ranks


def growth(before: int, after: int) -> Event:
    bounds = ScalingConfig(min_experts=after, max_experts=after, rebalance=False)
    return Event(
        name=f"grow from {before} expert ranks to {after}",
        begin=lambda engine: engine.scaler.set_bounds(bounds),
        is_over=lambda engine: is_whole(engine, after),
        target_s=1.0,
    )


def kill(what: str) -> list[Event]:
    """kill -9 of the expert rank that was there second, until others serve; then until another is in its place."""
    victims: list[int] = []

    def strike(engine: Engine) -> None:
        victims[:] = [len(ranks_of(engine, "expert")), ranks_of(engine, "expert")[1]]
        os.kill(engine.fleet.processes[victims[1]].pid or 0, signal.SIGKILL)

    def others_serve(engine: Engine) -> bool:
        return engine.router.snapshot.get("serving", False) and victims[1] not in ranks_of(engine, "expert")

    return [
        Event(name=f"kill -9 of an expert rank, {what}", begin=strike, is_over=others_serve, target_s=3.0),
        Event(
            name="another comes in its place",
            begin=lambda engine: None,
            is_over=lambda engine: is_whole(engine, victims[0], without=victims[1]),
            target_s=1.0,
        ),
    ]


class Script:
    """Lets one event follow the other while the load runs; `goes_on` is polled by it."""

    def __init__(self, engine: Engine, events: Sequence[Event], logs: Path) -> None:
        self._engine = engine
        self._events = list(events)
        self._logs = logs
        self._turn = -1
        self._next_s = time.monotonic() + 2 * QUIET_S
        self._served_s = time.monotonic()
        self.problem = ""

    def goes_on(self) -> bool:
        if self.problem or self._turn == len(self._events):
            return False
        now_s = time.monotonic()
        event = self._events[self._turn] if self._turn >= 0 else None
        if event is not None and not event.over_s:
            self._watch(event, now_s)
            if event.over_s:
                self._next_s = now_s + QUIET_S
            return True
        if now_s < self._next_s:
            return True
        if event is not None:
            event.later_captures = self._captures()
        self._turn += 1
        if self._turn == len(self._events):
            return False
        self._begin(self._events[self._turn])
        return True

    def _begin(self, event: Event) -> None:
        event.captures = self._captures()
        event.began_s = self._served_s = time.monotonic()
        event.begin(self._engine)

    def _watch(self, event: Event, now_s: float) -> None:
        lasted_s = now_s - event.began_s
        if lasted_s > 0.5 and event.is_over(self._engine):  # what is seen of a pipeline may be a second old
            event.over_s = now_s
        elif lasted_s > EVENT_TIMEOUT_S:
            self.problem = f"{event.name}: {self._engine.status().detail}"
        elif self._engine.router.status().serving:
            self._served_s = now_s
        elif now_s - self._served_s > STACKS_AFTER_S:
            self._served_s = now_s
            for rank, process in list(self._engine.fleet.processes.items()):
                path = self._logs / f"rank-{rank}.log"
                if path.exists() and path.stat().st_size and process.is_alive():  # else the signal would end it
                    os.kill(process.pid or 0, signal.SIGUSR1)

    def _captures(self) -> dict[str, int]:
        return {path.stem: path.read_text().count(CAPTURED) for path in self._logs.glob("rank-*.log")}


def measure(
    directory: Path, devices: list[str], events: list[Event], logs: Path, explains: Explains, **keys: Any
) -> list[dict[str, Any]]:
    """A row for each event, of a pipeline of its own."""
    logs.mkdir(parents=True, exist_ok=True)
    machines = parse_machines("cpu" if devices[0] == "cpu" else f"{len(devices)}xH200")
    items = workload((16, 256), (100, 300))
    began_s = time.monotonic()
    with Engine(directory, machines, devices, scaling={"rebalance": False}, logs=logs, **keys) as engine:
        print(f"started in {time.monotonic() - began_s:.1f} s: {keys}", flush=True)
        expected = [trace.token_ids for trace in engine.run(items)]
        offset_s = time.time() - time.monotonic()
        script = Script(engine, events, logs)
        done = engine.run_closed_loop(items, STREAMS, script.goes_on)
        if script.problem:
            print(f"FAILED: {script.problem}", flush=True)
        time.sleep(1.1)  # the snapshot is up to a second old
        changes = list(engine.router.snapshot["changes"])
    for change in changes:
        print(f"  {describe(change)}", flush=True)
    ends_s = [event.began_s for event in events[1:]] + [time.monotonic()]
    return [
        row_of(
            event,
            until_s,
            [c for c in changes if event.began_s <= ended_s(c) - offset_s < until_s],
            done,
            lambda n, ids: ids == expected[n] or explains(items[n], expected[n], ids),
        )
        for event, until_s in zip(events, ends_s, strict=True)
        if event.began_s
    ]


def ended_s(change: Change) -> float:
    return float(change["began_s"] + change["took_s"])


def describe(change: Change) -> str:
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in change["phases_s"].items())
    problem = f" FAILED: {change['problem']}" if change["problem"] else ""
    return f"{change['why']}: took {change['took_s']:.2f} s, paused {change['pause_s']:.2f} s ({phases}){problem}"


def row_of(
    event: Event,
    until_s: float,
    changes: list[Change],
    done: list[tuple[int, Trace]],
    is_right: Callable[[int, list[int]], bool],
) -> dict[str, Any]:
    """What clients saw between the event and the next, and what the router says of it."""
    traces = [trace for _, trace in done]
    gaps = [(at_s, at_s - before_s) for t in traces for before_s, at_s in zip(t.token_s, t.token_s[1:], strict=False)]
    usual = sorted(gap for at_s, gap in gaps if event.began_s - QUIET_S < at_s < event.began_s)
    struck = [gap for at_s, gap in gaps if event.began_s < at_s < until_s]
    touched = [(n, t) for n, t in done if t.sent_s < until_s and (not t.token_s or t.token_s[-1] > event.began_s)]
    kept = {
        name: event.later_captures.get(name, 0) - number
        for name, number in event.captures.items()
        if name in event.later_captures
    }
    return {
        "event": event.name,
        "answers": len(touched),
        "failed": sum(bool(t.problem) for _, t in touched),
        "other_tokens": sum(not t.problem and not is_right(n, t.token_ids) for n, t in touched),
        "usual_gap_ms": round(usual[len(usual) // 2] * 1e3, 1) if usual else 0.0,
        "longest_gap_s": round(max(struck, default=0.0), 3),
        "target_s": event.target_s,
        "pauses_s": [round(change["pause_s"], 3) for change in changes],
        "whole_after_s": round(event.over_s - event.began_s, 1) if event.over_s else None,
        "graphs_captured_again": kept,
        "changes": [describe(change) for change in changes],
    }


def render(rows: list[dict[str, Any]]) -> str:
    header = ("layout", "event", "answers", "failed", "other tokens", "usual gap ms", "longest gap s", "target s",
              "steps stood still s", "whole again s", "graphs captured again, by rank")  # fmt: skip
    keys = ("layout", "event", "answers", "failed", "other_tokens", "usual_gap_ms", "longest_gap_s", "target_s")
    return report.table(
        header,
        [
            [
                *(row[key] for key in keys),
                " + ".join(map(str, row["pauses_s"])),
                row["whole_after_s"],
                ", ".join(
                    f"{name.removeprefix('rank-')}: {n}" for name, n in sorted(row["graphs_captured_again"].items())
                ),
            ]
            for row in rows
        ],
    )


def scenarios(num_gpus: int) -> dict[str, tuple[list[Event], dict[str, Any]]]:
    """By layout: what happens, and the pipeline's keys. With four GPUs three serve at first, with two one does."""
    few = num_gpus - 1
    experts = num_gpus - 1  # of the disaggregated layout, once it has grown
    found: dict[str, tuple[list[Event], dict[str, Any]]] = {
        "colocated": (
            [growth(few, num_gpus), *kill("replicas elsewhere")],
            {"layout": "colocated", "attention_ranks": few, "expert_ranks": few, "expert_replicas": min(2, few)},
        )
    }
    if experts > 1:
        keys = {"layout": "disaggregated", "attention_ranks": 1, "expert_ranks": experts - 1}
        found["disaggregated"] = (
            [growth(experts - 1, experts), *kill("last holder of some experts")],
            keys,
        )
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--shape", default="scout-fp8")
    parser.add_argument("--layers", type=int, default=4, help="cut the model to this many layers; 0: all")
    parser.add_argument("--exact", action="store_true", help="a checkpoint of the whole shape, in float32")
    parser.add_argument("--only", default="", help="layouts with that in their name")
    parser.add_argument("--events", type=int, default=3, help="the first so many alone")
    parser.add_argument("--cpu", action="store_true", help="ranks on the CPU instead, to try the program")
    parser.add_argument("--pipeline", default="{}", help="JSON: more pipeline keys")
    parser.add_argument("--logs", type=Path, default=None, help="folder for the ranks' logs")
    parser.add_argument("--write", default="", help="name under benchmarks/results")
    return parser.parse_args()


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each event of each layout."""
    devices = ["cpu"] * args.gpus if args.cpu else [f"cuda:{i}" for i in range(args.gpus)]
    keys = {"max_model_len": 2048, "kv_cache_bytes": 1 << 30, "max_num_seqs": 64} | json.loads(args.pipeline)
    if args.exact:
        directory, keys = ensure_shape_model(args.shape, folder), keys | {"dtype": "float32"}
    else:
        directory, keys = describe_model(folder / "model", args.shape, args.layers), keys | {"load": "dummy"}
    close_calls = CloseCalls(directory) if args.exact else None

    def explains(item: Item, one: list[int], other: list[int]) -> bool:
        return close_calls is not None and close_calls.explains(item, one, other, None)

    rows: list[dict[str, Any]] = []
    for layout, (events, of_layout) in scenarios(args.gpus).items():
        if args.only in layout:
            logs = (args.logs or folder / "logs") / layout
            found = measure(directory, devices, events[: args.events], logs, explains, **(of_layout | keys))
            rows += [{"layout": layout, **row} for row in found]
    return rows


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(args, Path(folder))
    text = render(rows)
    print(text)
    if args.write:
        model = f"{args.shape}, fp32" if args.exact else f"{args.shape}, {args.layers or 'all'} layers"
        title = f"Growth and losses on GPUs: {model}, {STREAMS} streams"
        changes = [f"- {row['layout']}, {row['event']}: {change}" for row in rows for change in row["changes"]]
        lines = [report.preamble(title, f"{args.gpus} x H200"), text, "", *changes]
        report.write(args.write, "\n".join(lines), {"events": rows, "commit": report.commit()})


if __name__ == "__main__":
    main()
