"""The bare engine for benchmarks: the real router and the real ranks as processes, without Ray, Serve or text."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

from actors.checkpoint.config import read_model_config
from actors.config import PipelineConfig, ScalingConfig
from actors.dispatch.group import RendezvousStore
from actors.router.worker import Router
from actors.types import Beat, Request, RouterStatus, SamplingParams, Submit
from actors.wire import FROM_ROUTER, TO_ROUTER, open_socket
from benchmarks.trace import Trace
from benchmarks.workload import Item
from cluster.hardware import Machines, local_cpu
from cluster.layout import resolve
from cluster.local_fleet import LocalFleet
from cluster.membership import plan_membership

START_TIMEOUT_S = 300.0
BEAT_S = 1.0


class Engine:
    """A pipeline that one thread drives. Use as a context manager."""

    def __init__(
        self,
        directory: Path,
        machines: Machines | None = None,
        devices: Sequence[str] = (),
        scaling: dict[str, Any] | None = None,
        logs: Path | None = None,
        **keys: Any,
    ) -> None:
        """`keys` are the pipeline's. `logs`: where ranks' logs go (see LocalFleet)."""
        config = PipelineConfig.parse({"model": str(directory), **keys})
        model = read_model_config(directory)
        plan = resolve(config, model, machines or local_cpu())
        self.pipeline = plan.pipeline
        self.fleet = LocalFleet(devices or ["cpu"] * len(plan.ranks), plan.pipeline.threads_per_rank, logs=logs)
        self._store = RendezvousStore("127.0.0.1")
        self._store.start()
        self.membership = plan_membership(plan, ScalingConfig.parse(scaling or {}))
        self.scaler = self.membership.autoscaler
        self.router = Router(
            plan.pipeline, model, self.membership.balancer, self.scaler, self.fleet, self._store.endpoint
        )
        self._context: zmq.Context[Any] = zmq.Context()
        self._next_id = 0

    def __enter__(self) -> "Engine":
        self._socket = open_socket(self._context, zmq.DEALER)
        self.endpoint = self.router.start("127.0.0.1")  # of the router, for clients of its own kind
        self._socket.connect(self.endpoint)
        ends_s = time.monotonic() + START_TIMEOUT_S
        while not (status := self.status()).serving:
            if self.router.broken or time.monotonic() > ends_s:
                self.__exit__()
                raise RuntimeError(f"the engine does not serve: {status.detail}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.router.stop()
        self.fleet.stop()
        self._store.stop()
        self._context.destroy(linger=0)

    def status(self) -> RouterStatus:
        self._socket.send(TO_ROUTER.encode(Beat()))
        while not isinstance(message := FROM_ROUTER.decode(self._socket.recv()), RouterStatus):
            pass
        return message

    def run(self, items: Sequence[Item], **sampling: Any) -> list[Trace]:
        """Sends all items at once, greedy unless told otherwise, and waits for all of them."""
        traces: dict[str, Trace] = {}
        for item in items:
            self._submit(item, traces, **sampling)
        open_requests, beat_s = set(traces), time.monotonic()
        while open_requests:
            if time.monotonic() - beat_s > BEAT_S:
                self._socket.send(TO_ROUTER.encode(Beat()))
                beat_s = time.monotonic()
            if self._socket.poll(200):
                self._take(FROM_ROUTER.decode(self._socket.recv()), traces, open_requests)
        return list(traces.values())

    def run_closed_loop(
        self, items: Sequence[Item], num_streams: int, goes_on: Callable[[], bool], **sampling: Any
    ) -> list[tuple[int, Trace]]:
        """`num_streams` clients that send one item after another, while `goes_on()`. Returns each answer with its
        item's number.
        """
        done: list[tuple[int, Trace]] = []
        number_of: dict[str, int] = {}
        traces: dict[str, Trace] = {}
        open_requests: set[str] = set()
        turn, beat_s = 0, time.monotonic()
        while open_requests or goes_on():
            while goes_on() and len(open_requests) < num_streams:
                number, turn = turn % len(items), turn + 1
                request_id = self._submit(items[number], traces, seed=number, **sampling)
                number_of[request_id] = number
                open_requests.add(request_id)
            if time.monotonic() - beat_s > BEAT_S:
                self._socket.send(TO_ROUTER.encode(Beat()))
                beat_s = time.monotonic()
            if self._socket.poll(50):
                before = set(open_requests)
                self._take(FROM_ROUTER.decode(self._socket.recv()), traces, open_requests)
                done += [(number_of[request_id], traces[request_id]) for request_id in before - open_requests]
        return done

    def _submit(self, item: Item, traces: dict[str, Trace], **sampling: Any) -> str:
        self._next_id += 1
        request = Request(
            request_id=str(self._next_id),
            prompt_ids=tuple(item.prompt_ids),
            sampling=SamplingParams(max_tokens=item.num_outputs, **({"temperature": 0.0} | sampling)),
        )
        traces[request.request_id] = Trace(time.perf_counter())
        self._socket.send(TO_ROUTER.encode(Submit(request=request)))
        return request.request_id

    @staticmethod
    def _take(message: Any, traces: dict[str, Trace], open_requests: set[str]) -> None:
        if isinstance(message, RouterStatus):
            return
        now_s = time.perf_counter()
        for event in message.events:
            trace = traces[event.request_id]
            trace.token_s += [now_s] * len(event.tokens)
            trace.token_ids += [token.token_id for token in event.tokens]
            if event.error:
                trace.problem = event.error.problem
            if event.error or event.finish_reason:
                open_requests.discard(event.request_id)


def tokens_per_s(traces: Sequence[Trace]) -> float:
    """All tokens over the time from the first request sent to the last token."""
    began, ended = min(t.sent_s for t in traces), max(t.token_s[-1] for t in traces)
    return sum(len(t.token_s) for t in traces) / (ended - began)
