"""The router: one thread that receives, schedules, launches and processes, step after step.

Owns the sockets to ingresses and ranks, the pipeline of steps in flight and the leases of ingresses. The decisions
are elsewhere and pure: `scheduler.py` (what a step computes), `epochs.py` (who takes part). Knows nothing of text or
tensors, and never imports ray: processes come from a `Fleet`.
"""

import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import zmq

from actors.checkpoint.config import ModelConfig
from actors.config import PipelineConfig
from actors.errors import CorralError, RankError, UnavailableError
from actors.router.epochs import Action, BeginServing, EndEpoch, EpochMachine, Phase, StartRanks, Tell
from actors.router.fleet import Fleet
from actors.router.metrics import RouterMetrics
from actors.router.scheduler import OwnedEvent, RankPages, Scheduler, SchedulerLimits
from actors.types import (
    Beat,
    Cancel,
    Epoch,
    ErrorInfo,
    Failed,
    FromRank,
    Joined,
    Loaded,
    Prepared,
    Progress,
    RankPlan,
    RankSpec,
    RouterStatus,
    StepPlan,
    StepResult,
    Submit,
    TokenBatch,
    TokenEvent,
    ToRank,
    ToRouter,
)
from actors.wire import FROM_RANK, FROM_ROUTER, TO_RANK, TO_ROUTER, bind_any, open_socket

log = logging.getLogger("corral.router")

STEPS_IN_FLIGHT = 2  # step n+1 is planned and sent while the ranks run step n
BEAT_S = 1.0
PATIENCE_MS = 20  # all that could be launched has been; only news changes that, and chores wait this long at most
RETRY_AFTER_S = 1.0


@dataclass(slots=True)
class _Step:
    """A step that ranks are running: who has not answered yet, and when it was sent."""

    step: int
    waiting_for: set[int]
    sent_s: float


@dataclass(slots=True)
class _Ranks:
    """The command channel to each rank of the pipeline, by rank."""

    endpoints: dict[int, str] = field(default_factory=dict)
    sockets: dict[int, zmq.Socket[Any]] = field(default_factory=dict)


class Router:
    """One pipeline's router. `start` returns the endpoint that ingresses connect to."""

    def __init__(
        self, pipeline: PipelineConfig, model: ModelConfig, specs: tuple[RankSpec, ...], fleet: Fleet, store: str
    ) -> None:
        """`pipeline` has nothing on auto. `store` is the endpoint at which the ranks of an epoch meet."""
        self._pipeline = pipeline
        self._specs = specs
        self._fleet = fleet
        self._machine = EpochMachine(specs, pipeline.as_dict(), store, pipeline.join_timeout_s)
        self._scheduler = Scheduler(SchedulerLimits.of(pipeline, model))
        self.metrics = RouterMetrics()
        self._context: zmq.Context[Any] = zmq.Context()
        self._poller = zmq.Poller()
        self._ranks = _Ranks()
        self._ingress_seen_s: dict[bytes, float] = {}
        self._outbox: dict[bytes, list[TokenEvent]] = {}
        self._epoch: Epoch | None = None
        self._has_served = False
        self._step = 0
        self._in_flight: deque[_Step] = deque()
        self._fleet_answers: queue.SimpleQueue[dict[int, str] | CorralError] = queue.SimpleQueue()
        self._next_beat_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="router", daemon=True)

    def start(self, host: str) -> str:
        self._front = open_socket(self._context, zmq.ROUTER)
        endpoint = bind_any(self._front, host)
        self._poller.register(self._front, zmq.POLLIN)
        self._thread.start()
        return endpoint

    def stop(self) -> None:
        """Ends the thread and closes the sockets; open requests are told UNAVAILABLE first."""
        self._stopping.set()
        self._thread.join(timeout=10)
        self._context.destroy(linger=0)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def broken(self) -> str | None:
        """The problem, where trying again is pointless (a broken checkpoint)."""
        return self._machine.problem if self._machine.phase is Phase.BROKEN else None

    def status(self) -> RouterStatus:
        load = self._scheduler.load()
        return RouterStatus(
            serving=self._machine.serving,
            detail=self._machine.detail(),
            epoch=self._machine.epoch_number,
            num_running=load.num_running,
            num_queued=load.num_queued,
            kv_used_fraction=load.kv_used_fraction,
        )

    # --- the loop -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._act(self._machine.begin())
        while not self._stopping.is_set():
            self._receive()
            self._schedule_and_launch()
            self._flush()
            self._keep_time()
        self._emit(self._scheduler.fail_all(_unavailable("the service is stopping"), include_queued=True))
        self._flush()

    def _receive(self) -> None:
        """Waits for the first message (or the next chore), then takes all that are there."""
        for taken in range(64):  # bounded, so that a flood of submits cannot hold back a step
            ready = dict(self._poller.poll(0 if taken else PATIENCE_MS))
            if not ready:
                return
            if self._front in ready:
                identity, data = self._front.recv_multipart()
                self._on_ingress(identity, TO_ROUTER.decode(data))
            for socket in list(self._ranks.sockets.values()):
                if socket in ready:
                    self._on_rank(FROM_RANK.decode(socket.recv()))

    def _schedule_and_launch(self) -> None:
        now_s = time.time()
        self._emit(self._scheduler.expire(now_s))
        while self._epoch is not None and (plans := self._scheduler.schedule(now_s)) is not None:
            self._launch(self._epoch, plans)

    def _launch(self, epoch: Epoch, plans: dict[int, RankPlan]) -> None:
        self._step += 1  # the scheduler counts the steps it plans in the same way
        tokens = {rank: sum(work.num_tokens for work in plan.work) for rank, plan in plans.items()}
        tokens_of_rank = tuple(tokens.get(spec.rank, 0) for spec in epoch.ranks)
        for spec in epoch.ranks:
            plan = StepPlan(
                epoch=epoch.epoch, step=self._step, tokens_of_rank=tokens_of_rank, rank_plan=plans.get(spec.rank)
            )
            self._tell(spec.rank, plan)
        self._in_flight.append(_Step(self._step, set(plans), time.monotonic()))
        self.metrics.step_launched(sum(tokens_of_rank))

    # --- what arrives ---------------------------------------------------------------------------------------------

    def _on_ingress(self, identity: bytes, message: ToRouter) -> None:
        self._ingress_seen_s[identity] = time.monotonic()
        match message:
            case Submit(request=request):
                try:
                    self._refuse_unless_ready()
                    self._scheduler.submit(request, identity, time.time())
                except CorralError as e:
                    event = TokenEvent(request_id=request.request_id, token_index=0, error=_as_info(e))
                    self._emit([OwnedEvent(identity, event)])
            case Cancel(request_id=request_id):
                self._emit(self._scheduler.cancel(request_id))
            case Beat():
                self._front.send_multipart([identity, FROM_ROUTER.encode(self.status())])

    def _refuse_unless_ready(self) -> None:
        """While the first epoch forms nothing is queued; after a loss requests wait in the queue for the next one."""
        if self._machine.phase is Phase.BROKEN or not self._has_served:
            raise UnavailableError(f"not serving: {self._machine.detail()}", RETRY_AFTER_S)

    def _on_rank(self, message: FromRank) -> None:
        now_s = time.time()
        match message:
            case StepResult():
                self._on_result(message)
            case Progress():
                self._machine.on_progress(message)
            case Loaded():
                self._act(self._machine.on_loaded(message, now_s))
            case Prepared():
                self._act(self._machine.on_prepared(message, now_s))
            case Joined():
                self._act(self._machine.on_joined(message))
            case Failed():
                log.warning("rank %d failed: %s", message.rank, message.problem)
                self._act(self._machine.on_failed(message, now_s))

    def _on_result(self, result: StepResult) -> None:
        if self._epoch is None or result.epoch != self._epoch.epoch:
            return
        try:
            self._emit(self._scheduler.complete(result.rank, result.step, result.tokens))
        except RankError as e:  # it does not follow the plan: nothing that it says can be trusted
            self._act(self._machine.end(str(e), time.time()))
            return
        self.metrics.step_completed(result)
        for step in self._in_flight:
            if step.step == result.step:
                step.waiting_for.discard(result.rank)
        while self._in_flight and not self._in_flight[0].waiting_for:
            self._in_flight.popleft()

    # --- membership -----------------------------------------------------------------------------------------------

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartRanks():
                    threading.Thread(target=self._ensure_ranks, name="fleet", daemon=True).start()
                case Tell(rank=rank, message=message):
                    self._tell(rank, message)
                case BeginServing(epoch=epoch, loaded=loaded):
                    self._begin_serving(epoch, loaded)
                case EndEpoch(problem=problem):
                    self._end_epoch(problem)

    def _ensure_ranks(self) -> None:
        try:
            self._fleet_answers.put(self._fleet.ensure(self._specs))
        except CorralError as e:
            self._fleet_answers.put(e)

    def _begin_serving(self, epoch: Epoch, loaded: dict[int, Loaded]) -> None:
        self._epoch = epoch
        attention = epoch.of_role("attention")
        self._has_served = True
        pages = {rank: RankPages(loaded[rank].global_pages, loaded[rank].chunked_pages) for rank in attention}
        self._scheduler.reset_ranks(pages)
        log.info("serving epoch %d with %d ranks", epoch.epoch, len(epoch.ranks))
        self._tell_ingresses(self.status())

    def _end_epoch(self, problem: str) -> None:
        log.warning("epoch %d is over: %s", self._machine.epoch_number, problem)
        self._epoch = None
        self._in_flight.clear()
        # Clients need no more than that: what was lost, and where, is in the log.
        self._emit(self._scheduler.fail_all(_unavailable("the pipeline lost a rank and is recovering")))
        self._flush()
        self._tell_ingresses(self.status())

    def _connect(self, endpoints: dict[int, str]) -> None:
        """Opens a channel to each rank, fresh where the process behind it is another one."""
        for rank, endpoint in endpoints.items():
            if self._ranks.endpoints.get(rank) == endpoint:
                continue
            if rank in self._ranks.sockets:
                self._poller.unregister(self._ranks.sockets[rank])
                self._ranks.sockets[rank].close(linger=0)
            socket = open_socket(self._context, zmq.DEALER)
            socket.connect(endpoint)
            self._poller.register(socket, zmq.POLLIN)
            self._ranks.endpoints[rank], self._ranks.sockets[rank] = endpoint, socket

    # --- chores ---------------------------------------------------------------------------------------------------

    def _keep_time(self) -> None:
        now_s = time.time()
        if not self._fleet_answers.empty():
            answer = self._fleet_answers.get()
            if isinstance(answer, CorralError):
                self._act(self._machine.start_failed(str(answer), now_s))
            else:
                self._connect(answer)
                self._act(self._machine.started())
        for rank, cause in self._fleet.lost():
            log.warning("rank %d lost: %s", rank, cause)
            self._act(self._machine.end(f"rank {rank} was lost", now_s))
        self._act(self._machine.tick(now_s))
        oldest = self._in_flight[0] if self._in_flight else None
        if oldest and time.monotonic() - oldest.sent_s > self._pipeline.step_timeout_s:
            late = ", ".join(map(str, sorted(oldest.waiting_for)))
            self._act(self._machine.end(f"step {oldest.step} got no answer from rank {late}", now_s))
        if time.monotonic() >= self._next_beat_s:
            self._next_beat_s = time.monotonic() + BEAT_S
            self._beat()

    def _beat(self) -> None:
        for rank in self._ranks.sockets:
            self._tell(rank, Beat())
        silent_since_s = time.monotonic() - self._pipeline.ingress_lease_s
        for identity in [i for i, seen_s in self._ingress_seen_s.items() if seen_s < silent_since_s]:
            log.warning("ingress %s is silent; its requests are cancelled", identity.hex())
            self._scheduler.cancel_owner(identity)  # its news has nobody to go to
            del self._ingress_seen_s[identity]
        self.metrics.set_load(self._scheduler.load(), self._machine.epoch_number, self._machine.serving)

    # --- what leaves ----------------------------------------------------------------------------------------------

    def _tell(self, rank: int, message: ToRank) -> None:
        self._ranks.sockets[rank].send(TO_RANK.encode(message))

    def _tell_ingresses(self, status: RouterStatus) -> None:
        for identity in self._ingress_seen_s:
            self._front.send_multipart([identity, FROM_ROUTER.encode(status)])

    def _emit(self, events: list[OwnedEvent]) -> None:
        for owner, event in events:
            self._outbox.setdefault(owner, []).append(event)

    def _flush(self) -> None:
        """One message per ingress with all its news."""
        for identity, events in self._outbox.items():
            self._front.send_multipart([identity, FROM_ROUTER.encode(TokenBatch(events=tuple(events)))])
        self._outbox.clear()


def _as_info(error: CorralError) -> ErrorInfo:
    return ErrorInfo(
        kind=type(error).__name__, problem=str(error), retry_after_s=float(getattr(error, "retry_after_s", 0.0))
    )


def _unavailable(problem: str) -> ErrorInfo:
    return ErrorInfo(kind="UnavailableError", problem=problem, retry_after_s=RETRY_AFTER_S)
