"""The router's thread and its sockets.

Owns the channels to ingresses and ranks and the loop that feeds the core: receive, then turn. What is done with a
message is `core.py`'s. Never imports ray: processes come from a `Fleet`.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import zmq

from actors.checkpoint.config import ModelConfig
from actors.config import PipelineConfig
from actors.router.core import RouterCore
from actors.router.epochs import EpochMachine
from actors.router.fleet import Fleet
from actors.router.limits import SchedulerLimits
from actors.router.membership import Goal, MembershipPlanner, Proposal, Scaler
from actors.router.metrics import RouterMetrics
from actors.types import FromRouter, Join, RankEndpoints, RouterStatus, StepPlan, ToRank
from actors.wire import FROM_RANK, FROM_ROUTER, TO_RANK, TO_ROUTER, ChannelKeys, bind_any, open_socket

log = logging.getLogger("corral.router")

PATIENCE_MS = 20  # all that could be sent has been; only news changes that, and chores wait this long at most
MESSAGES_PER_TURN = 64  # bounded, so that a flood of submits cannot hold back a step


class _Channels:
    """The sockets, as the core speaks through them (`core.Outside`). For the router's thread."""

    def __init__(self, context: zmq.Context[Any], keys: ChannelKeys | None) -> None:
        self._context = context
        self._keys = keys
        self._identity = f"router-{time.time_ns()}".encode()
        self._control: dict[int, zmq.Socket[Any]] = {}
        self._steps: dict[int, zmq.Socket[Any]] = {}
        self.poller = zmq.Poller()
        self._thinker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        self.thoughts: queue.SimpleQueue[Proposal | None] = queue.SimpleQueue()

    def bind(self, host: str) -> str:
        self.front = open_socket(self._context, zmq.ROUTER, self._keys, server=True)
        endpoint = bind_any(self.front, host)
        self.poller.register(self.front, zmq.POLLIN)
        return endpoint

    def connect(self, rank: int, endpoints: RankEndpoints) -> None:
        self.disconnect(rank)
        for sockets, endpoint in ((self._control, endpoints.control), (self._steps, endpoints.steps)):
            socket = open_socket(self._context, zmq.DEALER, self._keys)
            socket.setsockopt(zmq.IDENTITY, self._identity)  # by which a rank knows on both sockets whom it obeys
            socket.connect(endpoint)
            self.poller.register(socket, zmq.POLLIN)
            sockets[rank] = socket

    def disconnect(self, rank: int) -> None:
        for sockets in (self._control, self._steps):
            socket = sockets.pop(rank, None)
            if socket is not None:
                self.poller.unregister(socket)
                socket.close(linger=0)

    def to_rank(self, rank: int, message: ToRank) -> None:
        socket = (self._steps if isinstance(message, StepPlan | Join) else self._control).get(rank)
        if socket is not None:
            socket.send(TO_RANK.encode(message))

    def to_ingress(self, identity: bytes, message: FromRouter) -> None:
        self.front.send_multipart([identity, FROM_ROUTER.encode(message)])

    def think(self, work: Callable[[], Proposal | None]) -> None:
        self._thinker.submit(work).add_done_callback(lambda done: self.thoughts.put(done.result()))

    def stop(self) -> None:
        self._thinker.shutdown(wait=False, cancel_futures=True)

    def of_ranks(self) -> list[zmq.Socket[Any]]:
        return [*self._steps.values(), *self._control.values()]


class Router:
    """One pipeline's router. `start` returns the endpoint that ingresses connect to."""

    def __init__(
        self,
        pipeline: PipelineConfig,
        model: ModelConfig,
        planner: MembershipPlanner,
        scaler: Scaler,
        fleet: Fleet,
        store: str,
        keys: ChannelKeys | None = None,
    ) -> None:
        """`pipeline` has nothing on auto. `store` is the endpoint at which the ranks of an epoch meet."""
        goal = Goal(attention_ranks=pipeline.attention_ranks, expert_ranks=pipeline.expert_ranks)
        machine = EpochMachine(planner, goal, pipeline.as_dict(), store, pipeline.join_timeout_s, pipeline.contents)
        self._context: zmq.Context[Any] = zmq.Context()
        self._channels = _Channels(self._context, keys)
        self._core = RouterCore(pipeline, SchedulerLimits.of(pipeline, model), machine, scaler, fleet, self._channels)
        self._offset_s = time.time() - time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="router", daemon=True)

    def start(self, host: str) -> str:
        endpoint = self._channels.bind(host)
        self._thread.start()
        return endpoint

    def stop(self) -> None:
        """Ends the thread and closes the sockets. Requests are not ended: ingresses bring them to the next router."""
        self._stopping.set()
        self._thread.join(timeout=10)
        self._channels.stop()
        self._context.destroy(linger=0)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def broken(self) -> str | None:
        """The problem, where trying again is pointless (a broken checkpoint)."""
        return self._core.broken

    @property
    def metrics(self) -> RouterMetrics:
        return self._core.metrics

    @property
    def snapshot(self) -> dict[str, Any]:
        """The state for people, about a second old."""
        return self._core.snapshot

    def status(self) -> RouterStatus:
        return self._core.status()

    def _run(self) -> None:
        try:
            self._core.begin(self._now_s())
            while not self._stopping.is_set():
                self._receive()
                while not self._channels.thoughts.empty():
                    self._core.on_proposal(self._channels.thoughts.get(), self._now_s())
                self._core.turn(self._now_s())
        except BaseException:
            log.exception("the router's thread failed")
            raise

    def _now_s(self) -> float:
        """Unix time that never jumps."""
        return time.monotonic() + self._offset_s

    def _receive(self) -> None:
        """Waits for the first message (or the next chore), then takes all that are there."""
        channels, core = self._channels, self._core
        for taken in range(MESSAGES_PER_TURN):
            ready = dict(channels.poller.poll(0 if taken else PATIENCE_MS))
            if not ready:
                return
            now_s = self._now_s()
            if channels.front in ready:
                identity, data = channels.front.recv_multipart()
                core.on_ingress(identity, TO_ROUTER.decode(data), now_s)
            for socket in channels.of_ranks():
                if socket in ready and not socket.closed:
                    core.on_rank(FROM_RANK.decode(socket.recv()), now_s)
