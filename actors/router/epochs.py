"""How a pipeline's membership changes, as a pure state machine: first start, growth, balance, recovery after a loss.

Owns which ranks live, what they hold, the epoch that serves and the one change that is on its way. Knows nothing of
sockets, processes or requests: the router tells it what happened and carries out the actions that it returns. Time is
passed in, in seconds.

Ranks of one attention unit live and die together, as far as requests go: each has a part of every request's KV, and
which steps all of them have finished is known only while none fails. So a unit of several ranks keeps its requests
through changes that were planned, and through no loss.

A change goes through its phases in order, each begun when all its ranks have answered the one before: start the ranks
that are new, load what differs, prepare, finish the steps in flight, join. Up to the join the old epoch serves on, and
a change that fails leaves it so. A lost member of the epoch that serves ends that epoch and any change: the planner
says who can serve soonest, and the same phases bring them up again.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.expert.proofs import Disagreement, disagreements
from actors.router.actions import Action, BeginServing, ChangeRecord, Connect, Kill, Start, Suspend, Tell
from actors.router.change import Change, Phase, numbers, same_units, shared
from actors.router.membership import ExpertTokens, Goal, MembershipPlanner, Proposal
from actors.types import (
    Attach,
    Attached,
    Epoch,
    Failed,
    Join,
    Joined,
    Leave,
    Load,
    Loaded,
    Prepare,
    Prepared,
    Progress,
    RankEndpoints,
    RankSpec,
    SlotSource,
)

RETRY_FIRST_S = 0.1
RETRY_MOST_S = 10.0
FIND_TIMEOUT_S = 5.0  # for ranks of an earlier router to answer
START_TIMEOUT_S = 600.0  # for a process to come up; the cluster may have to bring a node first
LOAD_AGAIN_S = 5.0  # without news of a rank that loads: what it was told, or its answer, may be lost
PREPARE_MARGIN_S = 4.0  # peers are reached before they meet, and the group formed after
BLAME_AFTER_TRIES = 3  # a rank that does not answer so often is lost
HISTORY = 20


@dataclass(slots=True)
class _Member:
    """A process that lives or is being started. `spec` is what it is known to hold."""

    endpoints: RankEndpoints | None = None
    spec: RankSpec | None = None
    loaded: Loaded | None = None


class EpochMachine:
    """Drives one pipeline's membership. Whatever it is told, it returns the actions to carry out, in order."""

    def __init__(
        self,
        planner: MembershipPlanner,
        goal: Goal,
        pipeline: dict[str, Any],
        store: str,
        join_timeout_s: float,
        contents: str = "",
    ) -> None:
        """`pipeline` is the PipelineConfig as plain data, `contents` its property of that name; `store` the endpoint at
        which the ranks of an epoch meet.
        """
        self.goal = goal
        self._planner = planner
        self._pipeline = pipeline
        self._contents = contents
        self._store = store
        self._join_timeout_s = join_timeout_s
        self._members: dict[int, _Member] = {}
        self._finding: set[int] = set()
        self._finding_ends_s = float("inf")
        self._term = 0
        self._next_rank = 0
        self._number = 0  # of the latest epoch that was tried
        self._last: Epoch | None = None  # the epoch that serves, or served last
        self._kept: set[int] = set()  # attention ranks that have the requests of `_last`, as far as they live
        self._change: Change | None = None
        self._retry_at_s = float("inf")
        self._retry_s = RETRY_FIRST_S
        self._tries = 0  # to get up again since the last epoch served
        self._disputes = 0  # over what an expert's weights are, since a planned change succeeded
        self._suspended_s: float | None = None
        self._has_served = False  # so that requests may wait
        self._progress: dict[int, tuple[int, int]] = {}
        self.serving = False
        self.broken = False
        self.problem = ""
        self.history: deque[ChangeRecord] = deque(maxlen=HISTORY)
        self.num_done = self.num_failed = 0  # changes, of all time

    # --- what people see ----------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> Epoch | None:
        """The epoch that serves, or served last."""
        return self._last

    @property
    def may_plan(self) -> bool:
        """Whether new steps may be planned: an epoch serves, and no change waits for its steps to end."""
        return self.serving and not (self._change and self._change.phase is Phase.DRAINING)

    @property
    def draining(self) -> bool:
        """Whether `drained` is awaited, once no step is in flight."""
        return self._change is not None and self._change.phase is Phase.DRAINING

    @property
    def is_at_goal(self) -> bool:
        """Whether there are as many ranks as there should be."""
        epoch, goal = self._last, self.goal
        counts = (len(epoch.of_role("attention")), len(epoch.of_role("expert"))) if epoch else (0, 0)
        return counts == (goal.attention_ranks, goal.expert_ranks)

    @property
    def changing(self) -> str:
        """What the change that is on its way is for; empty if there is none."""
        return self._change.why if self._change else ""

    @property
    def next_rank(self) -> int:
        """The number that the next new rank gets, and those above it."""
        return self._next_rank

    def live_ranks(self) -> tuple[int, ...]:
        """Ranks whose processes listen."""
        return tuple(rank for rank, member in self._members.items() if member.endpoints is not None)

    def detail(self) -> str:
        """One line for people: what serves, what is going on and how far it is, and the last problem."""
        parts = ["serving" if self.serving else "not serving"]
        if self.broken:
            parts = ["cannot serve"]
        elif self._change is not None:
            text = self._change.phase.value
            if self._change.phase is Phase.LOADING and self._progress:
                done, total = (sum(p[i] for p in self._progress.values()) for i in (0, 1))
                text += f", {done / 1e9:.2f} of {total / 1e9:.2f} GB"
            parts.append(text)
        if self.problem and not self.serving:
            parts.append(self.problem)
        return ": ".join(parts)

    # --- beginnings ---------------------------------------------------------------------------------------------------

    def begin(self, found: Sequence[int], now_s: float) -> list[Action]:
        """`found` are the ranks that an earlier router left; their processes are being looked for."""
        self._term = int(now_s * 1000)
        self._next_rank = max(found, default=-1) + 1
        if not found:
            return self._bring_up("first start", now_s)
        self._has_served = True  # under the router before
        self._members = {rank: _Member() for rank in found}
        self._finding, self._finding_ends_s = set(found), now_s + FIND_TIMEOUT_S
        return []

    def want(self, proposal: Proposal, now_s: float) -> list[Action]:
        """Begins a planned change. Ask `idle` first."""
        within_s = START_TIMEOUT_S if proposal.start_within_s is None else proposal.start_within_s
        return self._start_change(proposal.ranks, proposal.why, now_s, is_planned=True, start_within_s=within_s)

    def idle(self, now_s: float) -> bool:
        """Whether an epoch serves, no change is on its way, and none has failed just now."""
        return self.serving and self._change is None and (self._retry_at_s == float("inf") or now_s >= self._retry_at_s)

    def proposer(self, tokens: ExpertTokens) -> Callable[[], Proposal | None]:
        """The question to the planner what comes next, to be asked in any thread: it knows only what is so now."""
        ranks = self._last.ranks if self._last else ()
        return partial(self._planner.propose, ranks, self.goal, tokens, self._next_rank)

    # --- news of processes --------------------------------------------------------------------------------------------

    def up(self, rank: int, endpoints: RankEndpoints, now_s: float) -> list[Action]:
        member = self._members.get(rank)
        if member is None:
            return [Kill(rank)]
        member.endpoints = endpoints
        actions: list[Action] = [Connect(rank, endpoints), Tell(rank, Attach(term=self._term))]
        return actions + self._answered(Phase.STARTING, rank, now_s)

    def on_attached(self, message: Attached, now_s: float) -> list[Action]:
        if message.rank not in self._finding:
            return []
        if message.spec is not None and message.contents != self._contents:
            return self.evict(message.rank, "what it holds is another pipeline's", now_s)
        self._members[message.rank].spec = message.spec
        self._finding.discard(message.rank)
        return [] if self._finding else self._found(now_s)

    def _found(self, now_s: float) -> list[Action]:
        self._finding_ends_s = float("inf")
        return self._bring_up("the router was restarted", now_s)

    def lose(self, rank: int, cause: str, now_s: float) -> list[Action]:
        """A rank is gone: its process ended, or the router gave it up (and kills it)."""
        if self._members.pop(rank, None) is None:
            return []
        problem = f"rank {rank} was lost: {cause}"
        if rank in self._finding:
            self._finding.discard(rank)
            return [] if self._finding else self._found(now_s)
        if self.serving and self._last is not None and rank in numbers(self._last.ranks):
            return self._suspend(problem, now_s) + self._bring_up(problem, now_s)
        if self._change is None or rank not in self._change.numbers:
            return []
        return self._fail(problem, now_s)

    def evict(self, rank: int, cause: str, now_s: float) -> list[Action]:
        """Gives up a rank that lives but does not answer."""
        return [Kill(rank), *self.lose(rank, cause, now_s)] if rank in self._members else []

    def break_epoch(self, problem: str, now_s: float) -> list[Action]:
        """The epoch that serves cannot go on, though nobody is known to be lost (a step without an answer)."""
        if not self.serving:
            return []
        return self._suspend(problem, now_s) + self._bring_up(problem, now_s)

    def keep_nothing(self) -> None:
        """Attention ranks forget their requests as they join the next epoch: what they were computing is not wanted."""
        self._kept = set()

    # --- answers of ranks ---------------------------------------------------------------------------------------------

    def on_progress(self, message: Progress, now_s: float) -> None:
        self._progress[message.rank] = (message.done_bytes, message.total_bytes)
        if self._change is not None:
            self._change.heard_s[message.rank] = now_s

    def on_loaded(self, message: Loaded, now_s: float) -> list[Action]:
        change = self._change
        if change is None or message.epoch != change.epoch.epoch or message.rank not in change.waiting_for:
            return []
        member = self._members[message.rank]
        member.loaded, member.spec = message, change.spec_of(message.rank)
        return self._answered(Phase.LOADING, message.rank, now_s)

    def on_prepared(self, message: Prepared, now_s: float) -> list[Action]:
        return self._answered(Phase.PREPARING, message.rank, now_s) if self._is_current(message.epoch) else []

    def drained(self, now_s: float) -> list[Action]:
        """No step is in flight any more."""
        return self._answered(Phase.DRAINING, -1, now_s)

    def on_joined(self, message: Joined, now_s: float) -> list[Action]:
        return self._answered(Phase.JOINING, message.rank, now_s) if self._is_current(message.epoch) else []

    def on_failed(self, message: Failed, now_s: float) -> list[Action]:
        """A rank could not do what it was told. Stale news of an epoch that is over is dropped."""
        problem = f"rank {message.rank}: {message.problem}"
        if self.serving and self._last is not None and message.epoch == self._last.epoch:
            return self.break_epoch(problem, now_s)
        change = self._change
        if change is not None and self._breaks_unit(message, change):
            self._kept -= shared(self._last)
            return self._fail(problem, now_s)
        if change is None or not self._is_current(message.epoch):
            return []
        change.problems.append(problem)
        change.accused.update(message.suspects)
        if message.fatal and self._last is None:
            self.broken, self.problem, self._change = True, problem, None
            return []
        if change.phase is Phase.LOADING:
            return self._fail(problem, now_s)
        return self._answered(change.phase, message.rank, now_s)

    def _breaks_unit(self, message: Failed, change: Change) -> bool:
        """Whether a rank reports, as the next epoch is joined, that it has not finished a step its leader answered."""
        is_late = self._last is not None and message.epoch == self._last.epoch and change.phase is Phase.JOINING
        return is_late and message.rank in self._kept & shared(self._last)

    def tick(self, now_s: float) -> list[Action]:
        """Lets time pass: a phase over its time fails, a pause ends."""
        if now_s >= self._finding_ends_s:
            return [action for rank in sorted(self._finding) for action in self.evict(rank, "silent", now_s)]
        change = self._change
        if change is not None and now_s >= change.ends_s:
            late = sorted(change.waiting_for)
            problem = f"{change.phase.value}: no answer from rank {', '.join(map(str, late))}"
            if change.phase is Phase.STARTING:
                return [action for rank in late for action in self.evict(rank, problem, now_s)]
            change.problems.append(problem)
            if self._tries >= BLAME_AFTER_TRIES:
                change.accused.update(late)
            return self._fail(problem, now_s)
        if change is None and not self.serving and not self.broken and now_s >= self._retry_at_s:
            return self._bring_up(self.problem, now_s)
        return self._load_again(change, now_s) if change is not None and change.phase is Phase.LOADING else []

    def _load_again(self, change: Change, now_s: float) -> list[Action]:
        """Tells ranks that have been silent once more what to load: those that have it only answer."""
        silent = [rank for rank in sorted(change.waiting_for) if now_s - change.heard_s[rank] > LOAD_AGAIN_S]
        change.heard_s.update(dict.fromkeys(silent, now_s))
        return [Tell(rank, change.loads[rank]) for rank in silent]

    # --- the phases ---------------------------------------------------------------------------------------------------

    def _bring_up(self, why: str, now_s: float) -> list[Action]:
        """The change to whatever can serve soonest, from the ranks that hold something now."""
        last = {spec.rank: spec for spec in self._last.ranks} if self._last else {}
        survivors: list[RankSpec] = []
        for rank, member in sorted(self._members.items()):
            if member.endpoints is not None and member.spec is not None:
                survivors.append(last.get(rank, member.spec))
        if survivors:
            lost = [spec for rank, spec in last.items() if rank not in self._members]
            ranks = self._planner.recover(survivors, lost, self._next_rank)
        else:
            ranks = self._planner.first(self.goal, self._next_rank)
        wanted = numbers(ranks)
        dropped: list[Action] = [Kill(rank) for rank in sorted(self._members) if rank not in wanted]
        self._members = {rank: member for rank, member in self._members.items() if rank in wanted}
        self._kept = (self._kept & wanted) - shared(self._last)
        return dropped + self._start_change(ranks, why, now_s, is_planned=False)

    def _start_change(
        self, ranks: tuple[RankSpec, ...], why: str, now_s: float, is_planned: bool,
        start_within_s: float = START_TIMEOUT_S,
    ) -> list[Action]:  # fmt: skip
        self._number = max(self._number + 1, int(now_s * 1000))  # above any epoch of a router before us
        self._change = Change(Epoch(epoch=self._number, ranks=ranks), why, now_s, is_planned)
        self._retry_at_s, self._progress = float("inf"), {}
        new = [spec for spec in ranks if spec.rank not in self._members]
        for spec in new:
            self._members[spec.rank] = _Member()
            self._next_rank = max(self._next_rank, spec.rank + 1)
        actions: list[Action] = [Start(spec.rank, spec.roles) for spec in new]
        starting = {rank for rank in numbers(ranks) if self._members[rank].endpoints is None}
        return actions + self._enter(Phase.STARTING, starting, now_s, start_within_s)

    def _enter(self, phase: Phase, waiting_for: set[int], now_s: float, timeout_s: float) -> list[Action]:
        change = self._change
        assert change is not None
        change.leave_phase(now_s)
        change.phase, change.waiting_for, change.ends_s = phase, waiting_for, now_s + timeout_s
        return [] if waiting_for else self._advance(now_s)

    def _answered(self, phase: Phase, rank: int, now_s: float) -> list[Action]:
        """Notes an answer; the last one ends the phase, well or badly."""
        change = self._change
        if change is None or change.phase is not phase:
            return []
        change.waiting_for.discard(rank)
        if change.waiting_for:
            return []
        return self._fail(change.problems[0], now_s) if change.problems else self._advance(now_s)

    def _advance(self, now_s: float) -> list[Action]:
        """Begins the phase after the one that has ended."""
        change = self._change
        assert change is not None
        match change.phase:
            case Phase.STARTING:
                return self._load(change, now_s)
            case Phase.LOADING:
                return self._prepare(change, now_s)
            case Phase.PREPARING:
                change.paused_s = now_s
                return self._enter(Phase.DRAINING, {-1} if self.serving else set(), now_s, float("inf"))
            case Phase.DRAINING:
                return self._join(change, now_s)
            case Phase.JOINING:
                return self._serve(change, now_s)

    def _load(self, change: Change, now_s: float) -> list[Action]:
        for spec in change.ranks:
            sources = self._sources(spec) if spec != self._members[spec.rank].spec else ()
            change.loads[spec.rank] = Load(
                epoch=change.epoch.epoch, spec=spec, pipeline=self._pipeline, sources=sources
            )
        change.heard_s = dict.fromkeys(change.loads, now_s)
        tells: list[Action] = [Tell(rank, load) for rank, load in change.loads.items()]
        return tells + self._enter(Phase.LOADING, change.numbers, now_s, float("inf"))

    def _sources(self, spec: RankSpec) -> tuple[SlotSource, ...]:
        """Peers that hold experts in the last epoch and can give them to `spec`'s rank."""
        peers = self._last.ranks if self._last and not self._disputes else ()
        sources = []
        for peer in peers:
            member = self._members.get(peer.rank)
            is_alike = peer.rank != spec.rank and peer.slots and peer.expert_shard == spec.expert_shard
            if is_alike and member and member.endpoints and member.endpoints.weights:
                sources.append(SlotSource(endpoint=member.endpoints.weights, experts=peer.slots))
        return tuple(sources)

    def _prepare(self, change: Change, now_s: float) -> list[Action]:
        loaded = {rank: member.loaded for rank, member in self._members.items() if member.loaded is not None}
        proofs = {rank: loaded[rank].proofs for rank in change.numbers}
        wrong = disagreements(change.ranks, proofs)
        if wrong:
            return self._settle_dispute(change, wrong[0], now_s)
        endpoints = tuple(self._steps_endpoint(spec.rank) for spec in change.ranks)
        store = self._store if len(change.ranks) > 1 else ""
        epoch = Epoch(epoch=change.epoch.epoch, ranks=change.ranks, store=store, endpoints=endpoints)
        change.epoch = epoch
        hurries = not self.serving and self._has_served
        tells: list[Action] = [Tell(s.rank, Prepare(epoch=epoch, hurries=hurries)) for s in change.ranks]
        timeout_s = self._join_timeout_s + PREPARE_MARGIN_S
        return tells + self._enter(Phase.PREPARING, change.numbers, now_s, timeout_s)

    def _settle_dispute(self, change: Change, wrong: Disagreement, now_s: float) -> list[Action]:
        """Replicas differ, and who is right is a guess. So next time all is read from the checkpoint; if they differ
        again, the one that is outvoted goes, and then the others and it in turn.
        """
        self._disputes += 1
        problem = f"rank {wrong.rank}, layer {wrong.layer}, slot {wrong.slot}: {wrong.why}"
        expert = change.spec_of(wrong.rank).slots[wrong.layer][wrong.slot]
        holders = [spec.rank for spec in change.ranks if expert in spec.slots.get(wrong.layer, ())]
        others = [rank for rank in holders if rank != wrong.rank]
        suspects = [wrong.rank] if self._disputes % 2 == 0 else others if self._disputes > 1 else []
        actions = self._fail(problem, now_s, [wrong.rank])
        return actions + [action for rank in suspects for action in self.evict(rank, problem, now_s)]

    def _steps_endpoint(self, rank: int) -> str:
        endpoints = self._members[rank].endpoints
        assert endpoints is not None, "it was waited for"
        return endpoints.steps

    def _join(self, change: Change, now_s: float) -> list[Action]:
        """From here on the epoch before is gone."""
        self.serving = False
        self._kept &= same_units(self._last, change.ranks)
        self._suspended_s = change.paused_s if self._suspended_s is None else self._suspended_s
        tells: list[Action] = [
            Tell(spec.rank, Join(epoch=change.epoch.epoch, fresh=spec.rank not in self._kept)) for spec in change.ranks
        ]
        return tells + self._enter(Phase.JOINING, change.numbers, now_s, self._join_timeout_s + 1.0)

    def _serve(self, change: Change, now_s: float) -> list[Action]:
        epoch, kept = change.epoch, frozenset(self._kept)
        members = numbers(epoch.ranks)
        loaded = {rank: member.loaded for rank, member in self._members.items() if rank in members and member.loaded}
        retired = sorted(set(self._members) - members)
        self._record(change, "", now_s)
        self._members = {rank: self._members[rank] for rank in members}
        self._last, self._change, self.serving, self._has_served = epoch, None, True, True
        self._kept = set(epoch.of_role("attention"))
        self._retry_s, self._tries, self.problem = RETRY_FIRST_S, 0, ""
        if change.is_planned:  # another recovery settles nothing: replicas may be left out of it
            self._disputes = 0
        return [BeginServing(epoch, loaded, kept & self._kept), *(Kill(rank) for rank in retired)]

    # --- failures -----------------------------------------------------------------------------------------------------

    def _suspend(self, problem: str, now_s: float) -> list[Action]:
        """The epoch that serves is over. A change that was on its way ends with it; what it loaded may be of use."""
        assert self._last is not None
        self.serving, self.problem, self._suspended_s = False, problem, now_s
        if self._change is not None:
            self._record(self._change, problem, now_s)
            self._change = None
        leave = Leave(epoch=self._last.epoch)
        survivors = [spec.rank for spec in self._last.ranks if spec.rank in self._members]
        return [Suspend(problem), *(Tell(rank, leave) for rank in survivors)]

    def _fail(self, problem: str, now_s: float, guilty: Sequence[int] = ()) -> list[Action]:
        """The change has failed. Whoever serves goes on; else it is tried again, without those who are to blame."""
        change = self._change
        assert change is not None
        self._record(change, problem, now_s)
        self._change = None
        self._retry_at_s = now_s + self._retry_s
        self._retry_s = min(self._retry_s * 2, RETRY_MOST_S)
        actions: list[Action] = []
        if self.serving and self._last is not None:
            serving = numbers(self._last.ranks)
            actions += [Kill(rank) for rank in sorted(self._members) if rank not in serving]
            self._members = {rank: member for rank, member in self._members.items() if rank in serving}
            return actions
        self._tries += 1
        self.problem = problem
        if change.phase is Phase.JOINING:
            leave = Leave(epoch=change.epoch.epoch)
            actions += [Tell(rank, leave) for rank in sorted(self._members) if rank in change.numbers]
        for rank in (*guilty, *change.most_accused):
            if rank in self._members:
                actions += [Kill(rank)]
                del self._members[rank]
        return actions

    def _record(self, change: Change, problem: str, now_s: float) -> None:
        self.num_failed += bool(problem)
        self.num_done += not problem
        pause_s = 0.0
        if not problem and self._suspended_s is not None:
            pause_s, self._suspended_s = now_s - self._suspended_s, None
        self.history.append(change.record(problem, pause_s, now_s))

    def _is_current(self, epoch: int) -> bool:
        return self._change is not None and self._change.epoch.epoch == epoch
