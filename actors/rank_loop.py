"""The life of a rank: commands in, answers out, until nobody renews its lease.

Owns the rank's sockets, their threads and the lease. What a command does is `rank.py`'s. Plans and joins run one by one
in the thread of the steps socket. Everything else comes over the control socket, which always answers: what takes long
(loading, preparing) runs in a third thread beside the steps.

One router at a time: a rank obeys who attached with the highest term, so a router that was replaced is not heard.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from actors.config import PipelineConfig
from actors.errors import CheckpointError, ConfigError, CorralError, UnreachableError
from actors.expert.weight_server import WeightServer
from actors.laps import Laps
from actors.rank import Launched, Rank
from actors.types import (
    Alive,
    Attach,
    Attached,
    Beat,
    Failed,
    FromRank,
    Join,
    Joined,
    Leave,
    Load,
    Prepare,
    Prepared,
    Progress,
    RankEndpoints,
    StepPlan,
    ToRank,
)
from actors.wire import FROM_RANK, TO_RANK, bind_any, open_socket

log = logging.getLogger("corral.rank")

POLL_MS = 200
IDLE_MS = 20  # that a rank is left alone before it goes on with what can wait
PROGRESS_S = 0.5
MAX_LAUNCHED = 2  # steps: one runs on the device, one waits behind it
LOOK_S = 20e-6  # between looks at the device and at the socket
ANSWERS = "inproc://answers"


class RankLoop:
    """Serves one rank's commands. `start` binds and returns the endpoints; `run` returns when the lease runs out or
    `stop` was called.
    """

    def __init__(self, rank: Rank, lease_s: float) -> None:
        self._rank = rank
        self._lease_s = lease_s
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = b""  # identity of the router that is obeyed, the same on both sockets
        self._term = -1
        self._heard_s = time.monotonic()
        self._stopping = threading.Event()
        self._tasks: queue.SimpleQueue[Callable[[], FromRank] | None] = queue.SimpleQueue()
        self._launched: deque[tuple[bytes, Launched]] = deque()  # and whose plans they are
        self._at_work = threading.Lock()  # of tasks, and of what is done in idle time, which they would spoil
        self._crash: BaseException | None = None

    def start(self) -> RankEndpoints:
        self._control = open_socket(self._context, zmq.ROUTER, self._rank.keys, server=True)
        self._steps = open_socket(self._context, zmq.ROUTER, self._rank.keys, server=True)
        for server in (self._control, self._steps):
            server.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._answers = open_socket(self._context, zmq.PULL)  # from the task thread, to be sent by the control thread
        self._answers.bind(ANSWERS)
        self._weights = WeightServer(self._rank.address, lambda: self._rank.experts, self._rank.keys)
        return RankEndpoints(
            control=bind_any(self._control, self._rank.address),
            steps=bind_any(self._steps, self._rank.address),
            weights=self._weights.start(),
        )

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        """Serves the control socket in this thread, steps and tasks in two others. Raises what broke one of them."""
        threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("steps", self._run_steps), ("tasks", self._run_tasks))
        ]
        for thread in threads:
            thread.start()
        try:
            self._run_control()
        finally:
            self._stopping.set()
            self._tasks.put(None)
            self._rank.interrupt()
            threads[0].join()  # the task thread may be reading for long: it is a daemon, and the process ends
            self._rank.stop()
            self._weights.stop()
            for server in (self._control, self._steps, self._answers):
                server.close(linger=0)
        if self._crash is not None:
            raise self._crash

    def _guarded(self, work: Callable[[], None]) -> None:
        """A thread that fails ends the rank: half of one would only look alive."""
        try:
            work()
        except BaseException as e:
            self._crash = e
            self._stopping.set()

    # --- control ------------------------------------------------------------------------------------------------------

    def _run_control(self) -> None:
        poller = zmq.Poller()
        poller.register(self._control, zmq.POLLIN)
        poller.register(self._answers, zmq.POLLIN)
        while not self._stopping.is_set() and self._lease_holds():
            ready = dict(poller.poll(POLL_MS))
            if self._answers in ready:
                self._control.send_multipart([self._router, self._answers.recv()])
            if self._control in ready:
                identity, data = self._control.recv_multipart()
                self._on_control(identity, TO_RANK.decode(data))

    def _lease_holds(self) -> bool:
        silent_s = time.monotonic() - self._heard_s
        if silent_s <= self._lease_s:
            return True
        log.warning("no router for %.0f s: the lease is over", silent_s)
        return False

    def _on_control(self, identity: bytes, message: ToRank) -> None:
        if isinstance(message, Attach) and message.term > self._term:
            self._router, self._term = identity, message.term
            self._rank.interrupt()  # nobody waits for the steps of the router before
        if identity != self._router:
            return
        self._heard_s = time.monotonic()
        match message:
            case Beat():
                self._reply(Alive(rank=self._rank.rank, pace=self._rank.pace))
            case Attach():
                self._reply(Attached(rank=self._rank.rank, spec=self._rank.spec, contents=self._rank.contents))
            case Leave(epoch=epoch):
                began_s = time.monotonic()
                self._rank.interrupt(epoch)
                log.info("rank %d: epoch %d is over; interrupted in %.3f s",
                         self._rank.rank, epoch, time.monotonic() - began_s)  # fmt: skip
            case Load(epoch=epoch):
                self._rank.supersede(epoch)
                self._tasks.put(lambda: self._load(message))
            case Prepare(epoch=prepared):
                self._rank.supersede(prepared.epoch)
                self._tasks.put(lambda: self._prepare(message))

    def _reply(self, message: FromRank) -> None:
        self._control.send_multipart([self._router, FROM_RANK.encode(message)])

    # --- beside the steps ---------------------------------------------------------------------------------------------

    def _run_tasks(self) -> None:
        """Carries tasks out in their order; their answers go through the control thread."""
        self._out = open_socket(self._context, zmq.PUSH)
        self._out.connect(ANSWERS)
        try:
            while (task := self._tasks.get()) is not None:
                with self._at_work:
                    answer = task()
                self._out.send(FROM_RANK.encode(answer))
        finally:
            self._out.close(linger=0)

    def _load(self, message: Load) -> FromRank:
        next_report_s = 0.0

        def report(done_bytes: int, total_bytes: int) -> None:
            nonlocal next_report_s
            if time.monotonic() >= next_report_s:
                next_report_s = time.monotonic() + PROGRESS_S
                progress = Progress(rank=self._rank.rank, done_bytes=done_bytes, total_bytes=total_bytes)
                self._out.send(FROM_RANK.encode(progress))

        try:
            pipeline = PipelineConfig.parse(message.pipeline)
            self._lease_s = pipeline.lease_s
            laps = Laps()
            self._rank.load(message.spec, pipeline, message.sources, report)
            laps.lap("loaded")
            loaded = self._rank.loaded(message.epoch)
            laps.lap("proven")
            log.info("rank %d, epoch %d: %s", self._rank.rank, message.epoch, laps)
            return loaded
        except CorralError as e:
            return self._failure(message.epoch, e)

    def _prepare(self, message: Prepare) -> FromRank:
        laps = Laps()
        try:
            self._rank.prepare(message.epoch, message.hurries)
            laps.lap("prepared")
            log.info("rank %d, epoch %d: %s", self._rank.rank, message.epoch.epoch, laps)
        except CorralError as e:
            return self._failure(message.epoch.epoch, e)
        return Prepared(rank=self._rank.rank, epoch=message.epoch.epoch)

    # --- steps --------------------------------------------------------------------------------------------------------

    def _run_steps(self) -> None:
        """Launches a step as soon as its plan is here, at most one ahead of the one that is answered next. While there
        is none, does what a step would have to wait for later.
        """
        poll_ms = POLL_MS
        while not self._stopping.is_set():
            if self._launched and not self._next_plan_comes():
                self._answer_oldest()
            elif self._steps.poll(poll_ms):
                identity, data = self._steps.recv_multipart()
                if identity == self._router:
                    self._on_step(identity, TO_RANK.decode(data))
            else:
                poll_ms = IDLE_MS if self._use_idle_time() else POLL_MS

    def _use_idle_time(self) -> bool:
        """Whether there was anything to do. A task comes first; one that comes meanwhile waits."""
        if not self._at_work.acquire(blocking=False):
            return False
        try:
            return self._rank.use_idle_time()
        finally:
            self._at_work.release()

    def _next_plan_comes(self) -> bool:
        """Waits for the next plan while the oldest step runs, if it may be launched before that is done."""
        if len(self._launched) == MAX_LAUNCHED or not self._rank.runs_ahead:
            return False
        while not self._launched[0][1].is_done:
            if self._steps.poll(0):
                return True
            time.sleep(LOOK_S)
        return bool(self._steps.poll(0))

    def _answer_oldest(self) -> None:
        identity, launched = self._launched.popleft()
        self._answer(identity, launched.plan.epoch, lambda: self._rank.finish(launched))

    def _on_step(self, identity: bytes, message: ToRank) -> None:
        """Takes a plan or a join; a join waits for what was launched."""
        match message:
            case StepPlan():
                self._answer(identity, message.epoch, lambda: self._launch(identity, message))
            case Join(epoch=epoch, fresh=fresh):
                while self._launched:
                    self._answer_oldest()
                self._answer(identity, epoch, lambda: self._join(epoch, fresh))

    def _launch(self, identity: bytes, plan: StepPlan) -> None:
        try:
            launched = self._rank.launch(plan)
        except CorralError:
            while self._launched:  # they were launched before, so they are answered before
                self._answer_oldest()
            raise
        if launched is not None:
            self._launched.append((identity, launched))

    def _join(self, epoch: int, fresh: bool) -> Joined:
        self._rank.join(epoch, fresh)
        return Joined(rank=self._rank.rank, epoch=epoch)

    def _answer(self, identity: bytes, epoch: int, work: Callable[[], FromRank | None]) -> None:
        """Sends what `work` returns, or its failure. What nobody meant to raise is told before it ends the rank."""
        try:
            answer = work()
        except CorralError as e:
            answer = self._failure(epoch, e)
        except Exception as e:
            log.exception("the step failed")
            self._steps.send_multipart([identity, FROM_RANK.encode(self._failure(epoch, e))])
            raise
        if answer is not None:
            self._steps.send_multipart([identity, FROM_RANK.encode(answer)])

    def _failure(self, epoch: int, error: Exception) -> Failed:
        is_ours = isinstance(error, CorralError)
        return Failed(
            rank=self._rank.rank,
            epoch=epoch,
            problem=str(error) if is_ours else f"{type(error).__name__}: {error}",
            fatal=isinstance(error, CheckpointError | ConfigError),
            suspects=error.peers if isinstance(error, UnreachableError) else (),
        )
