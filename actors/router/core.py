"""What the router does, without its sockets: messages and time in, messages out.

Owns the order of things: what a message changes, when steps are planned and sent, what follows from an epoch's end, who
is given up for silence, and when the membership should change. The decisions are elsewhere and pure: `scheduler.py`
(what a step computes), `epochs.py` (who takes part). Knows nothing of text, tensors or sockets, so that a simulation
can drive it on a clock of its own.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from actors.config import PipelineConfig
from actors.errors import CorralError, RankError, UnavailableError
from actors.router.actions import Action, BeginServing, Connect, Kill, Start, Suspend, Tell
from actors.router.epochs import EpochMachine
from actors.router.expert_load import ExpertLoad
from actors.router.fleet import Fleet, RankUp
from actors.router.membership import Observation, Proposal, Scaler
from actors.router.metrics import RouterMetrics
from actors.router.pace import SlowRanks, replace_rank
from actors.router.scheduler import OwnedEvent, RankPages, Scheduler, SchedulerLimits
from actors.router.steps import SentStep, StepsInFlight
from actors.router.suspects import Suspects
from actors.types import (
    Alive,
    Attached,
    Beat,
    Cancel,
    Epoch,
    ErrorInfo,
    Failed,
    FromRank,
    FromRouter,
    Joined,
    Loaded,
    Prepared,
    Progress,
    RankEndpoints,
    Role,
    RouterStatus,
    StepPlan,
    StepResult,
    Submit,
    TokenBatch,
    TokenEvent,
    ToRank,
    ToRouter,
)

log = logging.getLogger("corral.router")

RANK_BEATS_PER_SILENCE = 4  # a rank is given up when it has answered none of so many
CHORES_S = 0.01  # between looks at the fleet and at timeouts
OBSERVE_S = 1.0
RETRY_AFTER_S = 1.0
SUCCESSOR_START_S = 60.0  # for a slow rank's successor to come up: there was room for it


class Outside(Protocol):
    """The router's channels. None of these blocks; a message to a rank that is not connected is dropped."""

    def connect(self, rank: int, endpoints: RankEndpoints) -> None: ...

    def disconnect(self, rank: int) -> None: ...

    def to_rank(self, rank: int, message: ToRank) -> None: ...

    def to_ingress(self, identity: bytes, message: FromRouter) -> None: ...

    def think(self, work: Callable[[], Proposal | None]) -> None:
        """Computes something pure beside the steps; `RouterCore.on_proposal` gets the result."""
        ...


class RouterCore:
    """One pipeline's router. Drive it so: `begin`; then, again and again, `on_ingress` and `on_rank` for what arrived,
    and `turn`. All times are seconds of one clock that agrees with Unix time (requests' deadlines are Unix times).
    """

    def __init__(
        self,
        pipeline: PipelineConfig,
        limits: SchedulerLimits,
        machine: EpochMachine,
        scaler: Scaler,
        fleet: Fleet,
        outside: Outside,
    ) -> None:
        self._pipeline = pipeline
        self._machine = machine
        self._scaler = scaler
        self._fleet = fleet
        self._outside = outside
        self._scheduler = Scheduler(limits)
        self._steps = StepsInFlight()
        self._step = 0
        self._epoch: Epoch | None = None  # that steps may be sent to
        self._sequence = 0  # of the plan that was sent last in it
        self._expert_load = ExpertLoad()
        self._slow_ranks = SlowRanks()
        self._suspects = Suspects()
        self._ingress_seen_s: dict[bytes, float] = {}
        self._outbox: dict[bytes, list[TokenEvent]] = {}
        self._missed_beats: dict[int, int] = {}
        self._has_served = False
        self._thinks_of: Epoch | None = None  # the epoch whose successor the planner looks for
        self._down_since_s = 0.0
        self._next_chores_s = self._next_beat_s = self._next_observation_s = self._next_balance_s = 0.0
        self._observed = (0, 0.0)  # steps and their seconds at the last observation
        self.metrics = RouterMetrics()
        self.snapshot: dict[str, Any] = {}  # what `corral status` shows, replaced about once a second

    @property
    def broken(self) -> str | None:
        """The problem, where trying again is pointless (a broken checkpoint)."""
        return self._machine.problem if self._machine.broken else None

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        load = self._scheduler.load()
        return load.num_running + load.num_queued

    def status(self) -> RouterStatus:
        load = self._scheduler.load()
        return RouterStatus(
            serving=self._machine.serving,
            detail=self._machine.detail(),
            epoch=self._machine.epoch.epoch if self._machine.epoch else 0,
            num_running=load.num_running,
            num_queued=load.num_queued,
            kv_used_fraction=load.kv_used_fraction,
            model=self._pipeline.model,
        )

    def begin(self, now_s: float) -> None:
        self._down_since_s = now_s
        self._act(self._machine.begin(self._fleet.find(), now_s), now_s)

    def turn(self, now_s: float) -> None:
        """Plans and sends what can be, sends the news, looks after everything else."""
        self._schedule_and_launch(now_s)
        self._flush()
        if now_s >= self._next_chores_s:
            self._next_chores_s = now_s + CHORES_S
            self._chores(now_s)

    # --- steps --------------------------------------------------------------------------------------------------------

    def _schedule_and_launch(self, now_s: float) -> None:
        self._emit(self._scheduler.expire(now_s))
        if self._machine.draining and not self._steps:
            self._act(self._machine.drained(now_s), now_s)
        while self._machine.may_plan and (plans := self._scheduler.schedule(now_s)) is not None:
            self._step += 1  # the scheduler counts the steps it plans in the same way
            self._send(self._steps.sent(self._step, plans, now_s))

    def _send(self, sent: SentStep) -> None:
        """Sends a step to every rank of the epoch: for the first time, or again to those that did not answer it."""
        epoch = self._epoch
        assert epoch is not None, "steps are planned only while an epoch serves"
        tokens = {rank: sum(work.num_tokens for work in plan.work) for rank, plan in sent.plans.items()}
        tokens_of_rank = tuple(tokens.get(spec.unit, 0) for spec in epoch.ranks)
        self._sequence += 1
        for spec in epoch.ranks:
            plan = StepPlan(
                epoch=epoch.epoch, step=sent.step, sequence=self._sequence, tokens_of_rank=tokens_of_rank,
                rank_plan=sent.plans.get(spec.unit),
            )  # fmt: skip
            self._outside.to_rank(spec.rank, plan)
        self.metrics.step_launched(sum(tokens.values()))

    def _on_result(self, result: StepResult, now_s: float) -> None:
        """Results count whatever became of the epoch: what a rank has computed is not computed again."""
        try:
            self._emit(self._scheduler.complete(result.rank, result.step, result.tokens))
        except RankError as e:  # it does not follow the plan: nothing that it says can be trusted
            self._act(self._machine.evict(result.rank, str(e), now_s), now_s)
            return
        self.metrics.step_completed(result)
        self._steps.answered(result.rank, result.step)
        if result.expert_tokens:
            self._expert_load.add(result.expert_tokens, now_s)

    # --- what arrives -------------------------------------------------------------------------------------------------

    def on_ingress(self, identity: bytes, message: ToRouter, now_s: float) -> None:
        self._ingress_seen_s[identity] = now_s
        match message:
            case Submit(request=request, again=again):
                try:
                    self._refuse_unless_ready()
                    if again:
                        self._scheduler.forget(request.request_id)
                    self._scheduler.submit(request, identity, now_s, again)
                except CorralError as e:
                    index = len(request.output_ids)
                    event = TokenEvent(request_id=request.request_id, token_index=index, error=_as_info(e))
                    self._emit([OwnedEvent(identity, event)])
            case Cancel(request_id=request_id):
                self._emit(self._scheduler.cancel(request_id))
            case Beat():
                self._outside.to_ingress(identity, self.status())

    def _refuse_unless_ready(self) -> None:
        """While the first epoch forms nothing is queued; after a loss requests wait in the queue for the next one."""
        if self._machine.broken or not self._has_served:
            raise UnavailableError(f"not serving: {self._machine.detail()}", RETRY_AFTER_S)

    def on_rank(self, message: FromRank, now_s: float) -> None:
        machine = self._machine
        match message:
            case StepResult():
                self._on_result(message, now_s)
            case Alive(rank=rank, pace=pace):
                self._missed_beats[rank] = 0
                if pace is not None and self._epoch is not None:
                    self._slow_ranks.note(rank, pace, self._scheduler.num_pages_used(self._epoch.unit_of(rank)), now_s)
            case Progress():
                machine.on_progress(message, now_s)
            case Attached():
                self._act(machine.on_attached(message, now_s), now_s)
            case Loaded():
                self._act(machine.on_loaded(message, now_s), now_s)
            case Prepared():
                self._act(machine.on_prepared(message, now_s), now_s)
            case Joined():
                self._act(machine.on_joined(message, now_s), now_s)
            case Failed():
                log.warning("rank %d failed: %s", message.rank, message.problem)
                self._act(machine.on_failed(message, now_s), now_s)

    # --- membership ---------------------------------------------------------------------------------------------------

    def _act(self, actions: list[Action], now_s: float) -> None:
        for action in actions:
            match action:
                case Start(rank=rank, roles=roles):
                    self._fleet.start(rank, roles)
                case Kill(rank=rank):
                    self._missed_beats.pop(rank, None)
                    self._outside.disconnect(rank)
                    self._fleet.kill(rank)
                case Connect(rank=rank, endpoints=endpoints):
                    self._missed_beats[rank] = 0
                    self._outside.connect(rank, endpoints)
                case Tell(rank=rank, message=message):
                    self._outside.to_rank(rank, message)
                case Suspend(problem=problem):
                    self._suspend(problem, now_s)
                case BeginServing():
                    self._begin_serving(action, now_s)

    def _suspend(self, problem: str, now_s: float) -> None:
        log.warning("the epoch is over: %s", problem)
        self.metrics.epochs_lost += 1
        self._epoch = None
        self._end_suspects(problem, now_s)
        self._tell_ingresses()

    def _end_suspects(self, problem: str, now_s: float) -> None:
        """Requests that may be why epochs end, with the steps that they are in, which would be sent again."""
        guilty = self._suspects.after_loss(self._scheduler.in_flight(), now_s)
        if not guilty:
            return
        names = ", ".join(state.request_id for state in guilty)
        log.error("one epoch after another ended while requests were computed that are given up now: %s; the last: %s",
                  names, problem)  # fmt: skip
        self.metrics.requests_given_up += len(guilty)
        said = "ranks were lost each time that it was computed; it is not tried again"
        self._emit(self._scheduler.fail(guilty, ErrorInfo(kind="GivenUpError", problem=said)))
        self._machine.keep_nothing()

    def _begin_serving(self, action: BeginServing, now_s: float) -> None:
        epoch, kept = action.epoch, action.kept
        self._scheduler.change_ranks(_pages_of_units(epoch, action.loaded), kept)
        self._epoch, self._sequence = epoch, 0
        self._steps.keep_only(kept, now_s)
        for sent in self._steps:
            self._send(sent)
        record = self._machine.history[-1]
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in record.phases_s.items())
        log.info("serving epoch %d with %d ranks after %.2f s, %.0f ms of them without steps: %s (%s)", epoch.epoch,
                 len(epoch.ranks), record.took_s, record.pause_s * 1e3, record.why, phases)  # fmt: skip
        self._has_served = True
        self._tell_ingresses()

    # --- chores -------------------------------------------------------------------------------------------------------

    def _chores(self, now_s: float) -> None:
        for news in self._fleet.news():
            if isinstance(news, RankUp):
                self._act(self._machine.up(news.rank, news.endpoints, now_s), now_s)
            else:
                self._missed_beats.pop(news.rank, None)
                self._outside.disconnect(news.rank)
                self._act(self._machine.lose(news.rank, news.cause, now_s), now_s)
        self._act(self._machine.tick(now_s), now_s)
        self._end_late_step(now_s)
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + self._pipeline.rank_silence_s / RANK_BEATS_PER_SILENCE
            self._beat(now_s)
        if now_s >= self._next_observation_s:
            self._observe(now_s)
            self._next_observation_s = now_s + OBSERVE_S
        if self._machine.serving:
            self._down_since_s = now_s
        elif now_s - self._down_since_s > self._pipeline.recovery_timeout_s:
            self._give_up(now_s)

    def _end_late_step(self, now_s: float) -> None:
        oldest = self._steps.oldest
        if self._epoch is not None and oldest and now_s - oldest.sent_s > self._pipeline.step_timeout_s:
            late = ", ".join(map(str, sorted(oldest.plans)))
            self._act(self._machine.break_epoch(f"step {oldest.step} got no answer from rank {late}", now_s), now_s)

    def _beat(self, now_s: float) -> None:
        """Counts beats without an answer, not time: while we do not run ourselves, nobody else is to blame."""
        for rank in list(self._missed_beats):
            if rank not in self._missed_beats:
                continue  # it went with another one just now
            if self._missed_beats[rank] >= RANK_BEATS_PER_SILENCE:
                self._act(self._machine.evict(rank, "it does not answer", now_s), now_s)
            else:
                self._missed_beats[rank] += 1
                self._outside.to_rank(rank, Beat())
        silent_since_s = now_s - self._pipeline.ingress_lease_s
        for identity in [i for i, seen_s in self._ingress_seen_s.items() if seen_s < silent_since_s]:
            log.warning("ingress %s is silent; its requests are cancelled", identity.hex())
            self._scheduler.cancel_owner(identity)  # its news has nobody to go to
            del self._ingress_seen_s[identity]

    def _give_up(self, now_s: float) -> None:
        """Nobody waits for ever: what is open ends, and nothing is queued until an epoch serves again.

        Steps in flight stay: attention ranks that live are told in them whom to forget, and the scheduler awaits them.
        """
        self._has_served, self._down_since_s = False, now_s
        self._emit(self._scheduler.fail_all(_unavailable("the pipeline did not recover in time")))
        self._flush()

    def _observe(self, now_s: float) -> None:
        """Measures the load, and lets the membership follow it."""
        load, epoch = self._scheduler.load(), self._machine.epoch
        steps, seconds = self._observed
        self._observed = (self.metrics.answers, self.metrics.step_seconds)
        answers = self.metrics.answers - steps
        if epoch is not None and self._machine.serving:  # while it does not, the queue says nothing about its ranks
            seen = Observation(
                num_queued=load.num_queued,
                queue_s=self._scheduler.queue_s,
                num_running=load.num_running,
                num_seats=self._scheduler.num_seats,
                kv_used_fraction=load.kv_used_fraction,
                step_ms=(self.metrics.step_seconds - seconds) / answers * 1e3 if answers else 0.0,
                attention_ranks=len(epoch.of_role("attention")),
                expert_ranks=len(epoch.of_role("expert")),
            )
            self._machine.goal = self._scaler.observe(seen, now_s)
            self._replace_slow(epoch, now_s)
            self._follow_goal(now_s)
        self.metrics.set_load(load, epoch.epoch if epoch else 0, self._machine.serving)
        self._count_membership()
        self.snapshot = self._describe(now_s)

    def _count_membership(self) -> None:
        metrics, machine = self.metrics, self._machine
        epoch = machine.epoch if machine.serving else None
        roles: tuple[Role, ...] = ("attention", "expert")
        metrics.ranks = {role: len(epoch.of_role(role)) if epoch else 0 for role in roles}
        metrics.ranks_wanted = {"attention": machine.goal.attention_ranks, "expert": machine.goal.expert_ranks}
        metrics.changes_done, metrics.changes_failed = machine.num_done, machine.num_failed

    def _follow_goal(self, now_s: float) -> None:
        """Has the planner think of the next change, unless it does or one is on its way."""
        if self._thinks_of is not None or not self._machine.idle(now_s):
            return
        balancing = self._scaler.rebalances and now_s >= self._next_balance_s
        if balancing:
            self._next_balance_s = now_s + self._scaler.rebalance_interval_s
        self._thinks_of = self._machine.epoch
        knows_load = balancing or not self._machine.is_at_goal  # who comes should take what is hot
        self._outside.think(self._machine.proposer(self._expert_load.tokens(now_s) if knows_load else {}))

    def _replace_slow(self, epoch: Epoch, now_s: float) -> None:
        """Has a rank that is slow for good replaced, if there is room for another beside it."""
        roles_of = {spec.rank: spec.roles for spec in epoch.ranks}
        slow = self._slow_ranks.find(roles_of, self._scaler.slow_rank_factor, self._scaler.slow_rank_s, now_s)
        if slow is None or self._thinks_of is not None or not self._machine.idle(now_s):
            return
        self._slow_ranks.replaced(now_s)
        self.metrics.slow_ranks += 1
        log.warning("%s", slow.why)
        self._thinks_of = epoch
        ranks, fleet = replace_rank(epoch.ranks, slow.rank, self._machine.next_rank), self._fleet
        proposal = Proposal(ranks=ranks, why=slow.why, start_within_s=SUCCESSOR_START_S)
        self._outside.think(lambda: proposal if fleet.has_room(roles_of[slow.rank]) else None)

    def on_proposal(self, proposal: Proposal | None, now_s: float) -> None:
        """What `Outside.think` came to. It is of no use where the epoch that it is about is over."""
        epoch, self._thinks_of = self._thinks_of, None
        if proposal is not None and self._machine.idle(now_s) and self._machine.epoch is epoch:
            log.info("changing the membership: %s", proposal.why)
            self._next_balance_s = now_s  # a change may take several epochs
            self._act(self._machine.want(proposal, now_s), now_s)

    def _describe(self, now_s: float) -> dict[str, Any]:
        machine, epoch = self._machine, self._machine.epoch
        return {
            "serving": machine.serving,
            "detail": machine.detail(),
            "changing": machine.changing,
            "goal": {
                "attention_ranks": machine.goal.attention_ranks,
                "expert_ranks": machine.goal.expert_ranks,
                "why": machine.goal.why,
            },
            "epoch": epoch.epoch if epoch else 0,
            "ranks": [
                {
                    "rank": spec.rank,
                    "roles": spec.roles,
                    "endpoint": endpoint,
                    "slots": spec.slots,
                    "shard": spec.shard,
                    "unit": spec.unit,
                    "busy_ms": self._slow_ranks.busy_ms(spec.rank),
                }
                for spec, endpoint in zip(epoch.ranks, epoch.endpoints, strict=True)
            ]
            if epoch
            else [],
            "expert_tokens": self._expert_load.tokens(now_s),
            "load": self.metrics.load.as_dict() if self.metrics.load else {},
            "changes": [record.as_dict() for record in machine.history],
        }

    # --- what leaves --------------------------------------------------------------------------------------------------

    def _tell_ingresses(self) -> None:
        status = self.status()
        for identity in self._ingress_seen_s:
            self._outside.to_ingress(identity, status)

    def _emit(self, events: list[OwnedEvent]) -> None:
        for owner, event in events:
            self._outbox.setdefault(owner, []).append(event)

    def _flush(self) -> None:
        """One message per ingress with all its news."""
        for identity, events in self._outbox.items():
            self._outside.to_ingress(identity, TokenBatch(events=tuple(events)))
        self._outbox.clear()


def _pages_of_units(epoch: Epoch, loaded: Mapping[int, Loaded]) -> dict[int, RankPages]:
    """KV room by leader: ranks of one unit use the same pages, so the one that has fewest decides."""
    members = {leader: [loaded[spec.rank] for spec in epoch.ranks if spec.unit == leader] for leader in epoch.leaders()}
    return {
        leader: RankPages(min(m.global_pages for m in of_unit), min(m.chunked_pages for m in of_unit))
        for leader, of_unit in members.items()
    }


def _as_info(error: CorralError) -> ErrorInfo:
    return ErrorInfo(
        kind=type(error).__name__, problem=str(error), retry_after_s=float(getattr(error, "retry_after_s", 0.0))
    )


def _unavailable(problem: str) -> ErrorInfo:
    return ErrorInfo(kind="UnavailableError", problem=problem, retry_after_s=RETRY_AFTER_S)
