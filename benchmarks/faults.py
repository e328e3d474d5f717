"""What clients see when processes of a pipeline die or hang: streams over gRPC while one fault after another strikes.

python -m benchmarks.faults               # the table of faults, about five minutes; writes results/faults.md and .json
python -m benchmarks.faults --soak 600    # beside it, a random fault or scaling every 3 s for 600 s

Every answer is compared with a run without faults, token for token.
"""

import argparse
import asyncio
import itertools
import json
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from actors.checkpoint.shape_models import resolve_model_directory
from benchmarks import plot, report
from benchmarks.edges import CloseCalls
from benchmarks.served import Served
from benchmarks.workload import Item
from protos import inference_pb2, inference_pb2_grpc

STREAMS = 32
VOCAB = 250
NUM_ITEMS = 64
QUIET_S = 8.0  # of load before a fault, for the usual gaps, and after the pipeline is whole again
WHOLE_TIMEOUT_S = 90.0
EVERY_S = 3.0  # of a soak
SCALINGS = 0.25  # of what happens in it
FLAGS = ["--layout", "disaggregated", "--attention-ranks", "2", "--expert-ranks", "3", "--threads-per-rank", "1"]
EXPERT, ATTENTION, ROUTER = "ray::ExpertActor", "ray::AttentionActor", "ray::ServeReplica:corral:Router"


@dataclass(slots=True)
class Answer:
    """One request as its client saw it. Times are of time.monotonic."""

    item: int
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    problem: str = ""

    def gaps(self, from_s: float, to_s: float) -> list[float]:
        """Between news that came after `from_s`, where they began before `to_s`; the wait for the first one too."""
        times = [self.sent_s, *self.token_s]
        return [b - a for a, b in itertools.pairwise(times) if b > from_s and a < to_s]


class Load(threading.Thread):
    """`STREAMS` clients that send one request after another. Half are greedy, half seeded."""

    def __init__(self, address: str, items: Sequence[Item], num_streams: int = STREAMS) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._items = items
        self._num_streams = num_streams
        self._stopping = threading.Event()
        self.answers: list[Answer] = []
        self.running: list[Answer] = []

    def run(self) -> None:
        asyncio.run(self._run())

    def stop(self) -> list[Answer]:
        """Lets what is open end, and returns every answer."""
        self._stopping.set()
        self.join(120)
        assert not self.is_alive(), f"{len(self.running)} requests hang"
        return self.answers

    async def _run(self) -> None:
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            await asyncio.gather(*(self._stream(stub, i) for i in range(self._num_streams)))

    async def _stream(self, stub: inference_pb2_grpc.InferenceStub, number: int) -> None:
        turn = number
        while not self._stopping.is_set():
            answer = Answer(turn % len(self._items), time.monotonic())
            self.running.append(answer)
            try:
                await ask(stub, self._items[answer.item], answer)
            except grpc.RpcError as e:
                answer.problem = f"{e.code().name}: {e.details()}"
                await asyncio.sleep(0.2)
            self.running.remove(answer)
            self.answers.append(answer)
            turn += self._num_streams


def request_of(number: int, item: Item) -> inference_pb2.GenerateRequest:
    """Even numbers are greedy, odd ones seeded. Nothing is left to the checkpoint's generation_config.json, since
    `CloseCalls` judges by temperature and seed alone.
    """
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=item.prompt_ids),
        sampling=inference_pb2.Sampling(temperature=float(number % 2), top_p=1.0, seed=number),
        stopping=inference_pb2.Stopping(max_tokens=item.num_outputs, ignore_eos=True),
    )


async def ask(stub: inference_pb2_grpc.InferenceStub, item: Item, answer: Answer) -> None:
    async for chunk in stub.GenerateStream(request_of(answer.item, item), timeout=100):
        if chunk.token_ids:
            if chunk.token_index != len(answer.token_ids):
                answer.problem = f"token {chunk.token_index} came after {len(answer.token_ids)}"
            answer.token_s += [time.monotonic()] * len(chunk.token_ids)
            answer.token_ids += chunk.token_ids


def workload(seed: int = 3) -> list[Item]:
    rng = random.Random(seed)
    return [
        Item([rng.randrange(VOCAB) for _ in range(rng.randint(8, 64))], rng.randint(60, 200)) for _ in range(NUM_ITEMS)
    ]


class Judge:
    """Compares answers with those of a run without faults, which `look` takes."""

    def __init__(self, model: str, items: list[Item]) -> None:
        self._items = items
        self._close_calls = CloseCalls(resolve_model_directory(model))
        self._expected: dict[int, list[int]] = {}

    def look(self, address: str) -> None:
        async def run() -> None:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                answers = [Answer(i, time.monotonic()) for i in range(len(self._items))]
                await asyncio.gather(*(ask(stub, self._items[a.item], a) for a in answers))
                self._expected = {a.item: a.token_ids for a in answers}

        asyncio.run(run())

    def counts(self, answers: Sequence[Answer]) -> dict[str, int]:
        """`different` are those that no close call explains."""
        failed = [a for a in answers if a.problem]
        for answer in failed[:3]:
            print(f"  failed: {answer.problem}")
        others = [a for a in answers if not a.problem and a.token_ids != self._expected[a.item]]
        explained = sum(self._is_close_call(answer) for answer in others)
        for answer in others:
            expected = self._expected[answer.item]
            same = sum(
                1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(answer.token_ids, expected, strict=False))
            )
            print(
                f"  item {answer.item}: {len(answer.token_ids)} tokens for {len(expected)}, the first {same} the same"
            )
        return {
            "requests": len(answers),
            "failed": len(failed),
            "different": len(others) - explained,
            "close_calls": explained,
        }

    def _is_close_call(self, answer: Answer) -> bool:
        seed = answer.item if answer.item % 2 else None
        item, expected = self._items[answer.item], self._expected[answer.item]
        return self._close_calls.explains(item, expected, answer.token_ids, seed)


@dataclass(slots=True)
class Film:
    """When tokens came and faults struck, over everything that was measured."""

    token_s: list[float] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    offset_s: float = 0.0

    def add(self, answers: Sequence[Answer], marks: Sequence[tuple[float, str]]) -> None:
        """Puts a stretch of time behind those before it."""
        times = [time_s for answer in answers for time_s in answer.token_s]
        shift_s = self.offset_s - min(times)
        self.token_s += [time_s + shift_s for time_s in times]
        self.marks += [(time_s + shift_s, label) for time_s, label in marks]
        self.offset_s = max(self.token_s)


def strike(
    served: Served,
    judge: Judge,
    items: Sequence[Item],
    hurt: Callable[[], Any],
    counts: dict[str, int],
    film: Film,
    name: str,
) -> dict[str, Any]:
    """One fault under load. `counts` are the processes by title of a whole pipeline."""
    load = Load(served.grpc, items)
    load.start()
    time.sleep(QUIET_S)
    struck_s = time.monotonic()
    hurt()
    whole_s = wait_whole(served, counts, struck_s)
    time.sleep(QUIET_S / 2)
    answers = load.stop()
    film.add(answers, [(struck_s, name.replace(" rank", ""))])
    usual = [gap for a in answers for gap in a.gaps(struck_s - QUIET_S / 2, struck_s)]
    usual_s = statistics.quantiles(usual, n=100)[98]
    touched = [a for a in answers if a.sent_s < struck_s < (a.token_s[-1] if a.token_s else 0.0)]
    stalls = sorted(max(a.gaps(struck_s - 0.05, struck_s + 10.0), default=0.0) for a in touched)
    return {
        **judge.counts(answers),
        "streams_struck": len(touched),
        "usual_gap_p99_ms": round(usual_s * 1e3, 1),
        "added_stall_p50_ms": round((stalls[len(stalls) // 2] - usual_s) * 1e3, 1),
        "added_stall_p99_ms": round((stalls[min(len(stalls) - 1, int(len(stalls) * 0.99))] - usual_s) * 1e3, 1),
        "whole_again_s": round(whole_s, 1),
    }


def wait_whole(served: Served, counts: dict[str, int], since_s: float) -> float:
    """Seconds from `since_s` until all processes are there again and the service answers."""
    while time.monotonic() - since_s < WHOLE_TIMEOUT_S:
        time.sleep(0.5)
        alive = {title: len(served.pids(title)) for title in counts}
        if alive == counts and time.monotonic() - since_s > 4.0:
            return time.monotonic() - since_s
    raise AssertionError(f"not whole after {WHOLE_TIMEOUT_S} s: {alive}")


def faults(replicas: int) -> dict[str, tuple[str, signal.Signals]]:
    if replicas == 1:
        return {"expert rank, last holder": (EXPERT, signal.SIGKILL)}
    return {
        "expert rank, replicas elsewhere": (EXPERT, signal.SIGKILL),
        "attention rank": (ATTENTION, signal.SIGKILL),
        "router": (ROUTER, signal.SIGKILL),
        "hung expert rank (SIGSTOP)": (EXPERT, signal.SIGSTOP),
        "hung attention rank (SIGSTOP)": (ATTENTION, signal.SIGSTOP),
    }


def measure(model: str, film: Film) -> dict[str, Any]:
    results: dict[str, Any] = {}
    items = workload()
    judge = Judge(model, items)
    counts = {EXPERT: 3, ATTENTION: 2, ROUTER: 1}
    for replicas, slots in ((2, 6), (1, 3)):
        with Served(model, [*FLAGS, "--expert-replicas", str(replicas), "--set", f"expert_slots={slots}"]) as served:
            judge.look(served.grpc)
            for name, (title, how) in faults(replicas).items():
                results[name] = strike(
                    served,
                    judge,
                    items,
                    lambda t=title, h=how: served.hurt(t, h),
                    counts,
                    film,
                    name,  # type: ignore[misc]
                )
                print(json.dumps({name: results[name]}), flush=True)
    return results


def strike_at_random(served: Served, rng: random.Random) -> str:
    """One fault or scaling of many, by name; empty if there was nobody to strike."""
    if rng.random() < SCALINGS:
        experts, attention = rng.randint(3, 4), rng.randint(1, 3)
        served.scale(min_experts=experts, max_experts=experts, min_attention=attention, max_attention=attention)
        return f"to {experts} expert and {attention} attention ranks"
    title = rng.choices((EXPERT, ATTENTION, ROUTER), (6, 3, 1))[0]
    how = rng.choice((signal.SIGKILL, signal.SIGSTOP)) if title != ROUTER else signal.SIGKILL
    return f"{title.rpartition(':')[2]} {how.name}" if served.hurt(title, how) else ""


def soak(model: str, seconds: float, seed: int, film: Film) -> dict[str, Any]:
    """A random fault or scaling every 3 s."""
    rng, items = random.Random(seed), workload()
    judge = Judge(model, items)
    struck: dict[str, int] = {}
    marks: list[tuple[float, str]] = []
    with Served(model, [*FLAGS, "--expert-replicas", "2", "--set", "expert_slots=6"]) as served:
        judge.look(served.grpc)
        load = Load(served.grpc, items)
        load.start()
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            next_s = time.monotonic() + EVERY_S
            if name := strike_at_random(served, rng):
                struck[name] = struck.get(name, 0) + 1
                marks.append((time.monotonic(), ""))
            time.sleep(max(0.0, next_s - time.monotonic()))
        served.scale()
        wait_whole(served, {EXPERT: 3, ATTENTION: 2, ROUTER: 1}, time.monotonic())
        answers = load.stop()
    film.add(answers, marks)
    return {**judge.counts(answers), "seconds": seconds, "faults_and_scalings": struck}


TARGETS = {
    "expert rank, replicas elsewhere": 1.0,
    "expert rank, last holder": 5.0,
    "attention rank": 3.0,
    "router": 5.0,
}


def render(results: dict[str, Any]) -> str:
    keys = ("requests", "failed", "different", "close_calls", "streams_struck", "usual_gap_p99_ms",
            "added_stall_p50_ms", "added_stall_p99_ms")  # fmt: skip
    rows = [[name, *(r[key] for key in keys), TARGETS.get(name, ""), r["whole_again_s"]] for name, r in results.items()]
    header = ["fault", "requests", "failed", "other tokens", "close calls", "streams struck", "usual gap p99 ms",
              "added stall p50 ms", "added stall p99 ms", "target s", "whole again s"]  # fmt: skip
    return report.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shape:tiny")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of random faults instead of the table")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    text = report.preamble("Faults that no client sees")
    text += (
        f"\n2 attention and 3 expert ranks, {STREAMS} streams over gRPC, `{args.model}`, half greedy, half seeded.\n"
    )
    text += "Close calls differ from a token on that hung on how a sum is rounded (benchmarks/edges.py).\n\n"
    film = Film()
    if args.soak:
        values = soak(args.model, args.soak, args.seed, film)
        print(json.dumps(values, indent=2))
        text += f"```\n{json.dumps(values, indent=2)}\n```\n\n![tokens per second](faults-soak.svg)\n"
        report.write("faults-soak", text, values)
        report.picture("faults-soak", plot.rate_over_time(film.token_s, film.marks, "tokens/s", bucket_s=1.0))
        return
    results = measure(args.model, film)
    text += render(results) + "\n\n![tokens per second while faults strike](faults.svg)\n"
    report.write("faults", text, results)
    report.picture("faults", plot.rate_over_time(film.token_s, film.marks, "tokens/s"))
    print(render(results))


if __name__ == "__main__":
    main()
