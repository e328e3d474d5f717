"""A pipeline in virtual time: the real router core, planner and scaler over simulated ranks, network and clients.

One seed decides everything. Ranks execute plans literally (`scheduler_harness.FakeRank`), so a page or a token that
goes astray in any recovery shows. Faults are those of the real world as the router can see them: processes end, stop
and go on, are slow, cannot reach each other, fail to load or load nonsense; routers and ingresses die.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs
from scheduler_harness import FakeRank

from actors.router.pages import PageGeometry, RankPages
from actors.types import (
    EMPTY_SLOT,
    Alive,
    Attach,
    Attached,
    Beat,
    Epoch,
    Failed,
    FromRank,
    Join,
    Joined,
    Leave,
    Load,
    Loaded,
    Pace,
    Prepare,
    Prepared,
    RankEndpoints,
    RankPlan,
    RankSpec,
    SlotProof,
    StepPlan,
    StepResult,
    ToRank,
)

GROUP_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 3.0
LEASE_S = 30.0
NOTICE_S = 0.02  # until a peer of a dead process gets an error


class World:
    """The clock and what is due."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 1_000.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._due, (self.now_s + delay_s, self._count, action))

    def step(self) -> bool:
        """Lets the next thing happen."""
        if not self._due:
            return False
        self.now_s, _, action = heapq.heappop(self._due)
        action()
        return True

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability


@dataclass
class Faults:
    """What may go wrong at any time; the schedule turns these up and down."""

    load_fails: float = 0.0
    load_corrupts: float = 0.0
    start_fails: float = 0.0
    step_fails: float = 0.0  # on one rank, at its end, though all others finish it
    cut: set[frozenset[int]] = field(default_factory=set)  # pairs of ranks whose packets are lost
    deadly: set[tuple[int, ...]] = field(default_factory=set)  # prompts that end a rank which computes them


@dataclass
class Meeting:
    """Ranks of one epoch that wait for each other: to form the group, or in a step."""

    members: tuple[int, ...]
    arrived: dict[int, Callable[[bool], None]] = field(default_factory=dict)


class SimRank:
    """One process. Commands arrive in order on two channels; `stopped` is a process that SIGSTOP holds."""

    def __init__(self, cluster: "Cluster", rank: int) -> None:
        self.cluster = cluster
        self.rank = rank
        self.alive = True
        self.stopped = False
        self.slowness = 1.0
        self.pace: Pace | None = None
        self.spec: RankSpec | None = None
        self.filled: dict[int, list[int]] = {}  # experts whose weights really lie in the slots
        self.corrupt: set[tuple[int, int]] = set()
        self.epoch: Epoch | None = None
        self.prepared: Epoch | None = None
        self.over = 0
        self.preparing = 0  # the number of the epoch whose group is formed now
        self.fake: FakeRank | None = None
        self.taken_step = self.answered_step = self.sequence = 0
        self.term = -1
        self.answer: Callable[[FromRank], None] = lambda message: None
        self._tasks: deque[Load | Prepare] = deque()
        self._steps: deque[Join | StepPlan] = deque()
        self._late: list[Callable[[], None]] = []  # what arrived, or came due, while stopped
        self._in_task = self._in_step = False
        self._heard_s = cluster.world.now_s
        self._keep_lease()
        self._waits_in: Meeting | None = None

    @property
    def endpoints(self) -> RankEndpoints:
        return RankEndpoints(control=f"control{self.rank}", steps=f"steps{self.rank}", weights=f"weights{self.rank}")

    def _keep_lease(self) -> None:
        """A rank that hears no router ends by itself."""
        if self.alive and not self.stopped and self.cluster.world.now_s - self._heard_s > LEASE_S:
            self.cluster.kill(self.rank)
        elif self.alive:
            self.cluster.world.after(LEASE_S / 2, self._keep_lease)

    def do(self, action: Callable[[], None]) -> None:
        """Something of this process: now, once it goes on, or never."""
        if self.stopped:
            self._late.append(action)
        elif self.alive:
            action()

    def resume(self) -> None:
        self.stopped = False
        late, self._late = self._late, []
        for action in late:
            self.do(action)

    def receive(self, term: int, message: ToRank, answer: Callable[[FromRank], None]) -> None:
        self.do(lambda: self._receive(term, message, answer))

    def _receive(self, term: int, message: ToRank, answer: Callable[[FromRank], None]) -> None:
        if isinstance(message, Attach) and message.term > self.term:
            self.term, self.answer = message.term, answer
            self._end_epoch(self.epoch.epoch if self.epoch else 0)
        if term != self.term:
            return
        self._heard_s = self.cluster.world.now_s
        match message:
            case Beat():
                self.answer(Alive(rank=self.rank, pace=self.pace))
            case Attach():
                slots = {layer: tuple(experts) for layer, experts in self.filled.items()}
                self.answer(
                    Attached(rank=self.rank, spec=structs.replace(self.spec, slots=slots) if self.spec else None)
                )
            case Leave(epoch=epoch):
                self._end_epoch(epoch)
            case Load() | Prepare():
                self._supersede(message.epoch if isinstance(message, Load) else message.epoch.epoch)
                self._tasks.append(message)
                self._next_task()
            case Join() | StepPlan():
                self._steps.append(message)
                self._next_step()

    def _end_epoch(self, epoch: int) -> None:
        self.over = max(self.over, epoch)
        self._supersede(self.preparing + 1)
        if self.epoch is not None and self.epoch.epoch <= epoch:
            self.cluster.abandon(self)

    def _supersede(self, epoch: int) -> None:
        """Who waits for peers of an epoch before that one waits no longer."""
        if self.preparing < epoch:
            self.cluster.world.after(0.002, lambda preparing=self.preparing: self.cluster.stop_waiting(self, preparing))

    # --- beside the steps ---

    def _next_task(self) -> None:
        if self._in_task or not self._tasks:
            return
        self._in_task = True
        message = self._tasks.popleft()
        if isinstance(message, Prepare):
            self.cluster.world.after(0.005 * self.slowness, lambda: self.do(lambda: self._prepare(message)))
        else:
            missing = self._missing(message.spec)
            delay_s = (0.002 + 0.05 * len(missing)) * self.slowness
            self.cluster.world.after(delay_s, lambda: self.do(lambda: self._load(message)))

    def _missing(self, spec: RankSpec) -> list[tuple[int, int]]:
        return [
            (layer, slot)
            for layer, experts in spec.slots.items()
            for slot, expert in enumerate(experts)
            if expert != EMPTY_SLOT and self._filled_with(layer, slot) != expert
        ]

    def _filled_with(self, layer: int, slot: int) -> int:
        experts = self.filled.get(layer, [])
        return experts[slot] if slot < len(experts) else EMPTY_SLOT

    def _load(self, message: Load) -> None:
        self._in_task = False
        faults, world = self.cluster.faults, self.cluster.world
        in_use = self._own(self.epoch).slots if self.epoch and self.epoch.epoch > self.over else {}
        if self.spec is not None:
            assert self.spec.roles == message.spec.roles, "a rank never changes its roles"
            assert self.spec.shard == message.spec.shard, "a rank never changes its shard"
            assert self.spec.expert_shard == message.spec.expert_shard, "a rank never changes its slice"
        missing = self._missing(message.spec)
        for layer, slot in missing:
            used = in_use.get(layer, ())
            assert slot >= len(used) or used[slot] == EMPTY_SLOT, "a slot that serves was to be overwritten"
        if missing and world.chance(faults.load_fails):
            self.answer(Failed(rank=self.rank, epoch=message.epoch, problem="cannot read"))
        else:
            for layer, experts in message.spec.slots.items():
                held = self.filled.setdefault(layer, [])
                held += [EMPTY_SLOT] * (len(experts) - len(held))
            for layer, slot in missing:
                self.filled[layer][slot] = message.spec.slots[layer][slot]
                self.corrupt.discard((layer, slot))
                if world.chance(faults.load_corrupts):
                    self.corrupt.add((layer, slot))
            self.spec = message.spec
            self.answer(self._loaded(message.epoch))
        self._next_task()

    def _loaded(self, epoch: int) -> Loaded:
        assert self.spec is not None
        pages = self._pages()
        proofs = {
            layer: tuple(
                SlotProof(checksum=0, probe=0.0)
                if expert == EMPTY_SLOT
                else SlotProof(
                    checksum=hash((layer, expert, self.spec.expert_shard, (layer, slot) in self.corrupt)), probe=1.0
                )
                for slot, expert in enumerate(experts)
            )
            for layer, experts in self.spec.slots.items()
        }
        return Loaded(
            rank=self.rank, epoch=epoch, weight_bytes=1, page_tokens=self.cluster.geometry.page_tokens,
            global_pages=pages.global_pages, chunked_pages=pages.chunked_pages, proofs=proofs,
        )  # fmt: skip

    def _pages(self) -> RankPages:
        """KV room; of a unit's members the leader has most."""
        assert self.spec is not None
        if "attention" not in self.spec.roles:
            return RankPages(0)
        index, of = self.spec.shard
        pages = self.cluster.pages
        return RankPages(pages.global_pages + of - 1 - index, pages.chunked_pages + of - 1 - index)

    def _prepare(self, message: Prepare) -> None:
        """Meets the others, who are told by whoever cannot come. That somebody has died tells nobody anything."""
        epoch = message.epoch
        others = [spec.rank for spec in epoch.ranks if spec.rank != self.rank]
        deaf = tuple(other for other in others if not self.cluster.reaches(self.rank, other))

        def done(problem: str = "") -> None:
            self._in_task = False
            if problem:
                self.answer(Failed(rank=self.rank, epoch=epoch.epoch, problem=problem, suspects=deaf))
            else:
                self.prepared = epoch
                self.answer(Prepared(rank=self.rank, epoch=epoch.epoch))
            self._next_task()

        if deaf or self._own(epoch) != self.spec:
            self.cluster.refuse(epoch.epoch)
            done(f"cannot reach {deaf}" if deaf else "does not hold that")
            return
        self.preparing = epoch.epoch
        self.cluster.meet(
            self, ("prepare", epoch.epoch), epoch, 0.01, JOIN_TIMEOUT_S,
            lambda well: done("" if well else "the group did not form"),
        )  # fmt: skip

    def _own(self, epoch: Epoch) -> RankSpec:
        return epoch.ranks[epoch.position(self.rank)]

    # --- steps ---

    def _next_step(self) -> None:
        if self._in_step or not self._steps:
            return
        message = self._steps.popleft()
        if isinstance(message, Join):
            self._in_step = True
            self._join(message)
        elif self.epoch is None or message.epoch != self.epoch.epoch or message.epoch <= self.over:
            self._next_step()
        else:
            self._in_step = True
            self._step(message, self.epoch)

    def _done(self, message: FromRank | None) -> None:
        self._in_step = False
        if message is not None:
            self.answer(message)
        self._next_step()

    def _join(self, message: Join) -> None:
        self.leave()
        epoch = self.prepared
        if epoch is None or epoch.epoch != message.epoch:
            self._done(Failed(rank=self.rank, epoch=message.epoch, problem="not prepared"))
            return

        def joined() -> None:
            self.epoch = epoch
            self.sequence = 0
            if message.fresh:
                self.taken_step = self.answered_step = 0
                self.fake = FakeRank(self._pages(), self.cluster.geometry, self.cluster.max_num_seqs)
            self._done(Joined(rank=self.rank, epoch=epoch.epoch))

        self.cluster.check_units(epoch, self.rank, message.fresh)
        self.prepared = None
        self.cluster.world.after(0.005 * self.slowness, lambda: self.do(joined))

    def _step(self, plan: StepPlan, epoch: Epoch) -> None:
        self.sequence += 1
        if plan.sequence != self.sequence:
            self.leave()
            self._done(Failed(rank=self.rank, epoch=epoch.epoch, problem="plans were lost"))
            return
        if plan.rank_plan is not None and plan.step <= self.answered_step:
            self.cluster.kill(self.rank)  # tokens that nobody heard: it ends
            return
        if plan.rank_plan is not None and plan.step > self.taken_step:
            assert self.fake is not None
            self.fake.take_in(plan.rank_plan)
            self.taken_step = plan.step
        own = sum(work.num_tokens for work in plan.rank_plan.work) if plan.rank_plan else 0
        assert plan.tokens_of_rank[epoch.position(self.rank)] == own

        def computed(well: bool) -> None:
            self._count(sum(plan.tokens_of_rank), own)
            if well and plan.rank_plan is not None and self._is_deadly(plan.rank_plan):
                self.cluster.kill(self.cluster.world.rng.choice([spec.rank for spec in epoch.ranks]))
                if not self.alive:
                    return
                well = False
            if not well:
                self.leave()
                self._done(Failed(rank=self.rank, epoch=epoch.epoch, problem="lost a peer"))
            else:
                self._done(self._result(plan) if plan.rank_plan is not None else None)

        self.cluster.meet(self, ("step", epoch.epoch, plan.step), epoch, 0.003, GROUP_TIMEOUT_S, computed)

    def _is_deadly(self, plan: RankPlan) -> bool:
        assert self.fake is not None
        tokens = [tuple(self.fake.residents[work.request_idx].tokens) for work in plan.work]
        return any(ids[: len(prompt)] == prompt for ids in tokens for prompt in self.cluster.faults.deadly)

    def _count(self, num_tokens: int, num_own: int) -> None:
        """A millisecond for the step, and a fifth of one per row: an expert rank has any share of the tokens."""
        num_rows = num_own or self.cluster.world.rng.randint(0, num_tokens)
        if num_rows:
            before = self.pace or Pace(busy_us=0, num_steps=0, num_rows=0)
            busy_us = before.busy_us + int((1000 + 200 * num_rows) * self.slowness)
            self.pace = Pace(busy_us=busy_us, num_steps=before.num_steps + 1, num_rows=before.num_rows + num_rows)

    def _result(self, plan: StepPlan) -> StepResult | None:
        """A follower computes what its leader does, and answers nothing."""
        assert plan.rank_plan is not None and self.fake is not None and self.spec is not None
        self.cluster.check_experts(self.epoch)
        tokens = self.fake.run(plan.rank_plan)
        if not self.spec.leads:
            return None
        self.answered_step = plan.step
        return StepResult(
            rank=self.rank, epoch=plan.epoch, step=plan.step, tokens=tokens, elapsed_us=3000,
            expert_tokens=self.cluster.some_expert_tokens(sum(work.num_tokens for work in plan.rank_plan.work)),
        )  # fmt: skip

    def leave(self) -> None:
        if self.epoch is not None:
            left, self.epoch = self.epoch, None
            self.cluster.left(self, left)


class Cluster:
    """All processes and the network between them. Outlives routers."""

    def __init__(
        self, world: World, pages: RankPages, geometry: PageGeometry, max_num_seqs: int, moe_layers: Sequence[int],
        num_experts: int, most_ranks: int,
    ) -> None:  # fmt: skip
        self.world = world
        self.pages = pages
        self.geometry = geometry
        self.max_num_seqs = max_num_seqs
        self.moe_layers = tuple(moe_layers)
        self.num_experts = num_experts
        self.most_ranks = most_ranks
        self.faults = Faults()
        self.ranks: dict[int, SimRank] = {}
        self.starting: set[int] = set()
        self.skew = [1.0] * num_experts
        self._meetings: dict[Any, Meeting] = {}
        self._refused: set[int] = set()  # epochs
        self._told: dict[tuple[int, int], dict[int, bool]] = {}  # by epoch and unit: which member joins fresh
        self.on_up: Callable[[int], None] = lambda rank: None
        self.on_end: Callable[[int], None] = lambda rank: None

    def start(self, rank: int) -> None:
        assert rank not in self.ranks and rank not in self.starting, "a rank's number was given again"
        self.starting.add(rank)

        def up() -> None:
            if rank in self.starting:
                self.starting.discard(rank)
                if not self.world.chance(self.faults.start_fails) and len(self.ranks) < self.most_ranks:
                    self.ranks[rank] = SimRank(self, rank)
                self.on_up(rank)

        self.world.after(self.world.rng.uniform(0.3, 3.0), up)

    def kill(self, rank: int) -> None:
        self.starting.discard(rank)
        process = self.ranks.pop(rank, None)
        if process is None:
            return
        process.alive = False
        if process.epoch is not None:
            self.left(process, process.epoch)
        for key, meeting in list(self._meetings.items()):
            if rank in meeting.members and key[0] == "step":
                self.world.after(NOTICE_S, lambda key=key: self._break(key))  # type: ignore[misc]
        self.world.after(0.05, lambda: self.on_end(rank))

    def reaches(self, a: int, b: int) -> bool:
        return b in self.ranks and frozenset((a, b)) not in self.faults.cut

    def meet(
        self, process: SimRank, key: Any, epoch: Epoch, takes_s: float, timeout_s: float, then: Callable[[bool], None]
    ) -> None:
        """`then(True)` once all members are here and nothing keeps them apart, `then(False)` if that fails."""
        numbers = tuple(spec.rank for spec in epoch.ranks)
        meeting = self._meetings.setdefault(key, Meeting(numbers))
        meeting.arrived[process.rank] = then
        process._waits_in = meeting
        if key[1] in self._refused or (key[0] == "step" and any(self._has_left(rank, epoch) for rank in numbers)):
            self.world.after(NOTICE_S, lambda: self._break(key))
        timeout_s *= self.world.rng.uniform(1.0, 1.1)
        self.world.after(timeout_s, lambda: self._leave_meeting(process, key, meeting))
        if len(meeting.arrived) == len(numbers) and not self._is_cut(numbers):
            slowest = max(self.ranks[rank].slowness for rank in numbers if rank in self.ranks)
            self.world.after(takes_s * slowest * self.world.rng.uniform(0.5, 2.0), lambda: self._end(key, meeting))

    def refuse(self, epoch: int) -> None:
        """One of those who were to meet does not come."""
        self._refused.add(epoch)
        self.world.after(NOTICE_S, lambda: self._break(("prepare", epoch)))

    def stop_waiting(self, process: SimRank, epoch: int) -> None:
        meeting = self._meetings.get(("prepare", epoch))
        if meeting is not None:
            self._leave_meeting(process, ("prepare", epoch), meeting)

    def _is_cut(self, numbers: Sequence[int]) -> bool:
        return any(pair <= set(numbers) for pair in self.faults.cut)

    def _has_left(self, rank: int, epoch: Epoch) -> bool:
        process = self.ranks.get(rank)
        if process is None:
            return True
        return not process.stopped and (process.epoch is None or process.epoch.epoch != epoch.epoch)

    def _end(self, key: Any, meeting: Meeting) -> None:
        """All went well, unless somebody has gone since; then the last to finish may have missed something."""
        if self._meetings.get(key) is not meeting:
            return
        del self._meetings[key]
        whole = len(meeting.arrived) == len(meeting.members) and all(rank in self.ranks for rank in meeting.members)
        for rank, then in sorted(meeting.arrived.items()):
            well = whole or (len(meeting.arrived) == len(meeting.members) and self.world.chance(0.5))
            fails = key[0] == "step" and self.faults.step_fails > 0 and self.world.chance(self.faults.step_fails)
            self._tell(rank, then, well and not fails)

    def _break(self, key: Any) -> None:
        """A member is gone: all who wait fail, but some of them may have had everything already."""
        meeting = self._meetings.pop(key, None)
        if meeting is None:
            return
        all_came = len(meeting.arrived) == len(meeting.members)
        for rank, then in sorted(meeting.arrived.items()):
            self._tell(rank, then, key[0] == "step" and all_came and self.world.chance(0.5))

    def _leave_meeting(self, process: SimRank, key: Any, meeting: Meeting) -> None:
        if self._meetings.get(key) is meeting and process.rank in meeting.arrived:
            then = meeting.arrived.pop(process.rank)
            self._tell(process.rank, then, False)

    def _tell(self, rank: int, then: Callable[[bool], None], well: bool) -> None:
        process = self.ranks.get(rank)
        if process is not None:
            process._waits_in = None
            process.do(lambda: then(well))

    def abandon(self, process: SimRank) -> None:
        """The router has called the epoch over: a rank that waits in a step stops waiting."""
        for key, meeting in list(self._meetings.items()):
            if key[0] == "step" and process.rank in meeting.arrived:
                self._leave_meeting(process, key, meeting)

    def left(self, process: SimRank, epoch: Epoch) -> None:
        """Whoever waits for a rank that has left the group gets an error."""
        for key, meeting in list(self._meetings.items()):
            if key[:2] == ("step", epoch.epoch) and process.rank not in meeting.arrived:
                self.world.after(NOTICE_S, lambda key=key: self._break(key))  # type: ignore[misc]

    def check_units(self, epoch: Epoch, rank: int, fresh: bool) -> None:
        """Units are whole, their members are told the same, and those that keep requests all have all of them."""
        spec = epoch.ranks[epoch.position(rank)]
        if "attention" not in spec.roles:
            return
        members = {other.rank: other for other in epoch.ranks if other.unit == spec.unit}
        assert {other.shard for other in members.values()} == {(i, len(members)) for i in range(len(members))}
        assert members[spec.unit].leads and members[spec.unit].shard[0] == 0
        told = self._told.setdefault((epoch.epoch, spec.unit), {})
        told[rank] = fresh
        assert len(set(told.values())) == 1, "a part of a unit keeps its requests"
        if len(told) == len(members) > 1 and not fresh:
            done = {self.ranks[other].taken_step for other in members if other in self.ranks}
            assert len(done) == 1, "a member missed a step"

    def check_experts(self, epoch: Epoch | None) -> None:
        """Every expert that the epoch's routing table names is really there, and sound."""
        assert epoch is not None
        for layer in self.moe_layers:
            holders: dict[tuple[int, int], set[bool]] = {}  # of each slice of an expert, whether its weights are broken
            num_slices = epoch.ranks[-1].expert_shard[1]
            for spec in epoch.ranks:
                for slot, expert in enumerate(spec.slots.get(layer, ())):
                    if expert != EMPTY_SLOT:
                        process = self.ranks.get(spec.rank)
                        kinds = holders.setdefault((expert, spec.expert_shard[0]), set())
                        if process is not None:
                            kinds.add((layer, slot) in process.corrupt)
                            assert process._filled_with(layer, slot) == expert, "a slot without its weights serves"
            slices = [(expert, i) for expert in range(self.num_experts) for i in range(num_slices)]
            assert sorted(holders) == slices, "an expert has no holder"
            assert all(len(kinds) <= 1 for kinds in holders.values()), "replicas that differ serve"

    def some_expert_tokens(self, num_tokens: int) -> dict[int, tuple[int, ...]]:
        if not self.world.chance(0.1):
            return {}
        total = sum(self.skew)
        return {
            layer: tuple(int(1000 * num_tokens * share / total) for share in self.skew) for layer in self.moe_layers
        }


def resubmitted(request: Any, token_ids: Sequence[int]) -> Any:
    return structs.replace(request, output_ids=request.output_ids + tuple(token_ids))
