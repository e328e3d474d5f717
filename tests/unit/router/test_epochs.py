"""The membership machine, road by road. (`test_simulation.py` drives it through thousands of random ones.)"""

from collections.abc import Callable, Sequence

import pytest
from msgspec import structs

from actors.router.actions import Action, BeginServing, Connect, Kill, Start, Suspend, Tell
from actors.router.change import Phase
from actors.router.epochs import EpochMachine
from actors.router.membership import ExpertTokens, Goal, Proposal
from actors.types import (
    EMPTY_SLOT,
    Attach,
    Attached,
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
    SlotProof,
)

A, B, C = (RankSpec(rank=0, roles=("attention",)), RankSpec(rank=1, roles=("expert",), slots={1: (0, 1)}),
           RankSpec(rank=2, roles=("expert",), slots={1: (0, 1)}))  # fmt: skip
RIGHT, WRONG = SlotProof(checksum=7, probe=1.0), SlotProof(checksum=8, probe=1.0)


class Planner:
    """Says what the test wrote down."""

    def __init__(self, first: Sequence[RankSpec]) -> None:
        self.first_ranks = tuple(first)
        self.recovered: Callable[[Sequence[RankSpec], int], Sequence[RankSpec]] = lambda survivors, n: survivors

    def first(self, goal: Goal, next_rank: int) -> tuple[RankSpec, ...]:
        return self.first_ranks

    def recover(self, survivors: Sequence[RankSpec], lost: Sequence[RankSpec], next_rank: int) -> tuple[RankSpec, ...]:
        return tuple(self.recovered(survivors, next_rank))

    def propose(self, current: Sequence[RankSpec], goal: Goal, tokens: ExpertTokens, next_rank: int) -> Proposal | None:
        raise AssertionError("asked by the router only")


class Road:
    """A machine and the ranks that answer it, for as long as the test lets them."""

    def __init__(self, *ranks: RankSpec) -> None:
        self.planner = Planner(ranks)
        goal = Goal(attention_ranks=1, expert_ranks=len(ranks) - 1)
        self.machine = EpochMachine(self.planner, goal, {"model": "m"}, "127.0.0.1:1", join_timeout_s=2.0)
        self.now_s = 100.0
        self.silent: set[int] = set()
        self.proof: Callable[[int], SlotProof] = lambda rank: RIGHT
        self.told: list[Tell] = []
        self.done: list[Action] = []

    def play(self, actions: list[Action]) -> list[Action]:
        """Carries actions out, has ranks answer, and so on to the end. Returns all actions since the last call."""
        queue = list(actions)
        while queue:
            action = queue.pop(0)
            self.done.append(action)
            match action:
                case Start(rank=rank):
                    if rank not in self.silent:
                        queue += self.machine.up(rank, endpoints(rank), self.now_s)
                case Tell(rank=rank, message=message):
                    self.told.append(action)
                    if rank not in self.silent:
                        queue += self.answer(rank, message)
            if self.machine.draining:
                queue += self.machine.drained(self.now_s)
        done, self.done = self.done, []
        return done

    def answer(self, rank: int, message: object) -> list[Action]:
        m = self.machine
        match message:
            case Load(epoch=epoch, spec=spec):
                proofs = {layer: tuple(self.proof(rank) for _ in experts) for layer, experts in spec.slots.items()}
                return m.on_loaded(Loaded(rank=rank, epoch=epoch, weight_bytes=1, proofs=proofs), self.now_s)
            case Prepare(epoch=epoch):
                return m.on_prepared(Prepared(rank=rank, epoch=epoch.epoch), self.now_s)
            case Join(epoch=epoch):
                return m.on_joined(Joined(rank=rank, epoch=epoch), self.now_s)
        return []

    def up(self) -> "Road":
        self.play(self.machine.begin((), self.now_s))
        assert self.machine.serving
        self.told.clear()
        return self

    def messages(self, kind: type) -> list[tuple[int, object]]:
        return [(tell.rank, tell.message) for tell in self.told if isinstance(tell.message, kind)]


def endpoints(rank: int) -> RankEndpoints:
    return RankEndpoints(control=f"tcp://h:{rank}", steps=f"tcp://h:{rank + 100}", weights=f"tcp://h:{rank + 200}")


def kinds(actions: list[Action]) -> list[type]:
    return [type(action) for action in actions]


def test_the_phases_follow_each_other_once_all_have_answered() -> None:
    road = Road(A, B)
    actions = road.play(road.machine.begin((), 100.0))
    (begin,) = [action for action in actions if isinstance(action, BeginServing)]
    assert begin.epoch.ranks == (A, B) and begin.kept == frozenset() and set(begin.loaded) == {0, 1}
    order = [type(tell.message) for tell in road.told]
    assert order == [Attach, Attach, Load, Load, Prepare, Prepare, Join, Join]
    assert all(message.fresh for _, message in road.messages(Join))  # type: ignore[attr-defined]
    prepared = road.messages(Prepare)[0][1].epoch  # type: ignore[attr-defined]
    assert prepared.endpoints == ("tcp://h:100", "tcp://h:101") and prepared.store == "127.0.0.1:1"


def test_a_change_remembers_how_long_each_phase_took_and_hurries_while_nobody_serves() -> None:
    road = Road(A, B)
    road.play(road.machine.begin((), 100.0))
    assert [message.hurries for _, message in road.messages(Prepare)] == [False, False]  # type: ignore[attr-defined]
    road.told.clear()
    road.silent = {2}
    road.play(road.machine.want(Proposal(ranks=(A, B, C), why="grow"), 101.0))
    road.silent = set()
    road.play(road.machine.up(2, endpoints(2), 104.0))
    phases_s = road.machine.history[-1].phases_s
    assert phases_s["starting ranks"] == 3.0 and list(phases_s) == [phase.value for phase in Phase]
    assert not any(message.hurries for _, message in road.messages(Prepare))  # type: ignore[attr-defined]
    road.told.clear()
    road.play(road.machine.lose(2, "died", 110.0))
    assert all(message.hurries for _, message in road.messages(Prepare)) and road.messages(Prepare)  # type: ignore[attr-defined]


def test_one_silent_rank_holds_up_a_phase_and_others_cannot_answer_for_it() -> None:
    road = Road(A, B)
    road.silent = {1}
    road.play(road.machine.begin((), 100.0))
    assert "starting ranks" in road.machine.detail()
    road.play(road.machine.up(0, endpoints(0), 100.0))
    assert not road.messages(Load)


def test_a_planned_change_keeps_requests_and_retires_who_is_not_in_it() -> None:
    road = Road(A, B).up()
    actions = road.play(road.machine.want(Proposal(ranks=(A, C), why="another"), 101.0))
    assert kinds(actions)[0] is Start and BeginServing in kinds(actions)
    assert actions[-1] == Kill(1), "only once the new epoch serves"
    begin = next(action for action in actions if isinstance(action, BeginServing))
    assert begin.kept == {0} and not road.messages(Leave)
    assert {rank: message.fresh for rank, message in road.messages(Join)} == {0: False, 2: True}  # type: ignore[attr-defined]
    sources = dict(road.messages(Load))[2].sources  # type: ignore[attr-defined]
    assert [(source.endpoint, source.experts) for source in sources] == [("tcp://h:201", {1: (0, 1)})]


@pytest.mark.parametrize("fails", ["start", "load", "prepare"])
def test_a_change_that_fails_before_it_joins_leaves_the_old_epoch_serving(fails: str) -> None:
    road = Road(A, B).up()
    machine, old = road.machine, road.machine.epoch
    road.silent = {2}
    machine_actions = machine.want(Proposal(ranks=(A, B, C), why="grow"), 101.0)
    road.play(machine_actions)
    if fails == "start":
        actions = machine.lose(2, "no room", 101.0)
    else:
        road.play(machine.up(2, endpoints(2), 101.0))
        number = road.messages(Load)[0][1].epoch  # type: ignore[attr-defined]
        if fails == "prepare":
            road.play(
                machine.on_loaded(Loaded(rank=2, epoch=number, weight_bytes=1, proofs={1: (RIGHT, RIGHT)}), 101.0)
            )
        actions = machine.on_failed(Failed(rank=2, epoch=number, problem="broken"), 101.0)
        assert Kill(2) in actions
    assert machine.serving and machine.may_plan and machine.epoch is old and not road.messages(Join)
    assert not machine.idle(101.0) and machine.idle(111.0), "not again at once"
    assert machine.history[-1].problem


def test_steps_are_not_planned_from_draining_to_serving() -> None:
    road = Road(A, B).up()
    road.silent = {0, 1}
    actions = road.machine.want(Proposal(ranks=(A, B), why="again"), 101.0)
    number = actions[-1].message.epoch  # type: ignore[union-attr]
    for rank in (0, 1):
        actions = road.machine.on_loaded(
            Loaded(rank=rank, epoch=number, weight_bytes=1, proofs={1: (RIGHT,) * 2}), 101.0
        )
    assert road.machine.may_plan
    for rank in (0, 1):
        road.machine.on_prepared(Prepared(rank=rank, epoch=number), 101.0)
    assert road.machine.draining and road.machine.serving and not road.machine.may_plan
    actions = road.machine.drained(101.0)
    assert [type(a.message) for a in actions if isinstance(a, Tell)] == [Join, Join] and not road.machine.serving


def test_a_lost_member_ends_the_epoch_and_survivors_go_on_with_their_requests() -> None:
    road = Road(A, B, C).up()
    actions = road.play(road.machine.lose(1, "killed", 102.0))
    assert kinds(actions)[0] is Suspend
    assert {rank for rank, _ in road.messages(Leave)} == {0, 2}
    begin = next(action for action in actions if isinstance(action, BeginServing))
    assert begin.epoch.ranks == (A, C) and begin.kept == {0}
    assert not any(isinstance(action, Start) for action in actions)


def test_a_lost_attention_rank_is_not_kept_even_if_its_number_were() -> None:
    road = Road(A, B).up()
    road.planner.recovered = lambda survivors, n: (RankSpec(rank=n, roles=("attention",)), *survivors)[::-1]
    actions = road.play(road.machine.lose(0, "killed", 102.0))
    begin = next(action for action in actions if isinstance(action, BeginServing))
    assert begin.kept == frozenset() and Start(2, ("attention",)) in actions


def test_a_step_that_failed_ends_the_epoch_and_late_news_of_it_ends_no_other() -> None:
    road = Road(A, B).up()
    assert road.machine.epoch is not None
    first = road.machine.epoch.epoch
    road.play(road.machine.on_failed(Failed(rank=1, epoch=first, problem="lost a peer"), 103.0))
    assert road.machine.serving and road.machine.epoch.epoch > first
    assert road.machine.on_failed(Failed(rank=0, epoch=first, problem="lost a peer"), 103.0) == []
    assert road.machine.serving


def test_the_rank_that_nobody_reaches_goes() -> None:
    road = Road(A, B, C).up()
    road.silent = {0, 1, 2}
    road.told.clear()
    road.play(road.machine.break_epoch("a step was late", 103.0))
    number = road.messages(Load)[0][1].epoch  # type: ignore[attr-defined]
    for rank, proofs in ((0, {}), (1, {1: (RIGHT, RIGHT)}), (2, {1: (RIGHT, RIGHT)})):
        road.play(road.machine.on_loaded(Loaded(rank=rank, epoch=number, weight_bytes=1, proofs=proofs), 103.0))
    actions: list[Action] = []
    for rank, suspects in ((0, (2,)), (1, (2,)), (2, (0, 1))):
        actions = road.machine.on_failed(Failed(rank=rank, epoch=number, problem="deaf", suspects=suspects), 103.0)
    assert Kill(2) in actions and not road.machine.serving
    road.silent = set()
    road.play(road.machine.tick(103.2))
    assert road.machine.serving and road.machine.epoch is not None and road.machine.epoch.ranks == (A, B)


def test_a_router_that_restarts_takes_over_what_it_finds() -> None:
    road = Road(A, B)
    assert road.machine.begin((3, 5), 100.0) == []
    spec = RankSpec(rank=5, roles=("attention", "expert"), slots={1: (0, 1)})
    actions = road.machine.up(3, endpoints(3), 100.0) + road.machine.up(5, endpoints(5), 100.0)
    assert [type(action) for action in actions] == [Connect, Tell, Connect, Tell]
    road.play(road.machine.on_attached(Attached(rank=3), 100.0))
    done = road.play(road.machine.on_attached(Attached(rank=5, spec=spec), 100.0))
    assert Kill(3) in done, "it holds nothing"
    begin = next(action for action in done if isinstance(action, BeginServing))
    assert begin.epoch.ranks == (spec,) and begin.kept == frozenset(), "its requests belonged to another router"
    assert begin.epoch.store == "", "one rank meets nobody"


def test_found_ranks_that_hold_another_pipelines_weights_are_replaced() -> None:
    """Their slots are named as ours are, and hold something else."""
    road = Road(A, B)
    road.machine.begin((3, 5), 100.0)
    for rank in (3, 5):
        road.machine.up(rank, endpoints(rank), 100.0)
    spec = RankSpec(rank=5, roles=("attention", "expert"), slots={1: (0, 1)})
    road.play(road.machine.on_attached(Attached(rank=3), 100.0))
    done = road.play(road.machine.on_attached(Attached(rank=5, spec=spec, contents="another"), 100.0))
    assert Kill(5) in done
    begin = next(action for action in done if isinstance(action, BeginServing))
    assert not {3, 5} & {member.rank for member in begin.epoch.ranks}


def test_found_ranks_that_stay_silent_are_given_up() -> None:
    road = Road(A, B)
    road.machine.begin((7,), 100.0)
    assert road.machine.tick(104.0) == []
    actions = road.play(road.machine.tick(105.1))
    assert actions[0] == Kill(7) and road.machine.serving


def test_replicas_that_differ_may_not_serve_and_are_read_from_the_checkpoint_next() -> None:
    road = Road(A, B).up()
    road.proof = lambda rank: WRONG if rank == 2 else RIGHT
    road.play(road.machine.want(Proposal(ranks=(A, B, C), why="grow"), 101.0))
    assert road.machine.serving and road.machine.epoch is not None and road.machine.epoch.ranks == (A, B)
    assert "other weights" in road.machine.history[-1].problem
    road.told.clear()
    road.proof = lambda rank: RIGHT
    d = RankSpec(rank=3, roles=("expert",), slots={1: (0, EMPTY_SLOT)})
    road.play(road.machine.want(Proposal(ranks=(A, B, d), why="grow"), 120.0))
    assert dict(road.messages(Load))[3].sources == ()  # type: ignore[attr-defined]
    assert road.machine.epoch.ranks == (A, B, d)


def test_a_broken_checkpoint_at_first_start_is_the_end() -> None:
    road = Road(A, B)
    road.silent = {0, 1}
    road.play(road.machine.begin((), 100.0))
    for rank in (0, 1):
        road.play(road.machine.up(rank, endpoints(rank), 100.0))
    number = road.messages(Load)[0][1].epoch  # type: ignore[attr-defined]
    road.machine.on_progress(Progress(rank=1, done_bytes=1, total_bytes=2_000_000_000), 100.0)
    assert "2.00 GB" in road.machine.detail()
    assert road.machine.on_failed(Failed(rank=1, epoch=number, problem="no such file", fatal=True), 100.0) == []
    assert road.machine.broken and road.machine.tick(10_000.0) == []


def test_what_fails_is_tried_again_with_growing_pauses() -> None:
    road = Road(A, B)
    road.silent = {0, 1}
    road.play(road.machine.begin((), 100.0))
    pauses, now_s = [], 100.0
    for _ in range(9):
        ranks = sorted(road.machine._members)
        road.machine.lose(ranks[0], "died", now_s)
        began_s = now_s
        while not road.machine.changing:
            now_s += 0.01
            road.play(road.machine.tick(now_s))
        pauses.append(now_s - began_s)
    assert pauses[0] == pytest.approx(0.1, abs=0.02) and pauses[-1] == pytest.approx(10.0, abs=0.02)
    assert pauses == sorted(pauses)


# --- tensor-parallel attention ----------------------------------------------------------------------------------------


def member(rank: int, index: int, leader: int = -1, experts: tuple[int, ...] = (0, 1)) -> RankSpec:
    return RankSpec(rank=rank, roles=("attention", "expert"), slots={1: experts}, shard=(index, 2), leader=leader)


def test_a_unit_keeps_its_requests_through_a_planned_change() -> None:
    road = Road(member(0, 0), member(1, 1, 0)).up()
    moved = (member(0, 0), member(1, 1, 0, (0, EMPTY_SLOT)))
    actions = road.play(road.machine.want(Proposal(ranks=moved, why="replicas"), 101.0))
    begin = next(action for action in actions if isinstance(action, BeginServing))
    assert begin.kept == {0, 1}
    assert [message.fresh for _, message in road.messages(Join)] == [False, False]  # type: ignore[attr-defined]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_unit_that_loses_a_member_begins_afresh(lost: int) -> None:
    road = Road(member(0, 0), member(1, 1, 0)).up()
    road.planner.recovered = lambda survivors, n: (
        (member(0, 0), member(n, 1, 0)) if lost else (member(1, 1, n), member(n, 0))
    )
    actions = road.play(road.machine.lose(lost, "died", 101.0))
    begin = next(action for action in actions if isinstance(action, BeginServing))
    assert begin.kept == frozenset()
    assert [message.fresh for _, message in road.messages(Join)] == [True, True]  # type: ignore[attr-defined]
    assert begin.epoch.leaders() == ((0,) if lost else (2,))


def test_who_loads_a_slice_is_sent_to_those_that_hold_the_same_one() -> None:
    first, second = (structs.replace(spec, expert_shard=(i, 2)) for i, spec in enumerate((B, C)))
    road = Road(A, first, second).up()
    twin = structs.replace(second, rank=3)
    road.play(road.machine.want(Proposal(ranks=(A, first, second, twin), why="a twin"), 101.0))
    (source,) = dict(road.messages(Load))[3].sources  # type: ignore[attr-defined]
    assert source.endpoint == endpoints(second.rank).weights
    assert road.machine.serving and not road.machine.changing


def test_a_unit_begins_afresh_where_nobody_knows_which_steps_its_members_have_finished() -> None:
    road = Road(member(0, 0), member(1, 1, 0)).up()
    actions = road.play(road.machine.break_epoch("a step got no answer", 101.0))
    begin = next(action for action in actions if isinstance(action, BeginServing))
    assert begin.kept == frozenset()


def test_a_member_that_missed_a_step_may_say_so_while_the_next_epoch_is_joined() -> None:
    """Its leader had answered that step, so all seemed well when the steps had drained."""
    road = Road(member(0, 0), member(1, 1, 0)).up()
    machine, old = road.machine, road.machine.epoch
    assert old is not None
    road.silent = {1}
    road.play(machine.want(Proposal(ranks=(member(0, 0), member(1, 1, 0, (1, 0))), why="moves"), 101.0))
    number = road.messages(Load)[0][1].epoch  # type: ignore[attr-defined]
    road.play(
        machine.on_loaded(Loaded(rank=1, epoch=number, weight_bytes=1, proofs={1: (RIGHT, RIGHT)}), 101.0)
        + machine.on_prepared(Prepared(rank=1, epoch=number), 101.0)
    )
    assert "joining" in machine.detail()
    late = Failed(rank=1, epoch=old.epoch, problem="lost a peer in the last step")
    actions = road.play(machine.on_failed(late, 101.0))
    assert Leave in [type(action.message) for action in actions if isinstance(action, Tell)]
    road.silent = set()
    road.told.clear()
    actions = road.play(machine.tick(102.0))
    begin = next(action for action in actions if isinstance(action, BeginServing))
    assert begin.kept == frozenset()
    assert [message.fresh for _, message in road.messages(Join)] == [True, True]  # type: ignore[attr-defined]
