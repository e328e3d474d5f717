"""When the number of ranks should change: needs that last, one rank at a time, always within the bounds."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.config import ScalingConfig
from actors.router.membership import Goal, Observation, Scaler
from cluster.autoscale import Autoscaler

BOUNDS = ScalingConfig(min_experts=1, max_experts=4, min_attention=1, max_attention=3)
IDLE = Observation(
    num_queued=0,
    queue_s=0.0,
    num_running=0,
    num_seats=100,
    kv_used_fraction=0.0,
    step_ms=0.0,
    attention_ranks=1,
    expert_ranks=2,
)
WAITING = replace(IDLE, num_queued=5, queue_s=3.0, num_running=50, kv_used_fraction=0.5, step_ms=20.0)


class Pipeline:
    """Ranks that follow the goal at once, or not at all, observed once a second."""

    def __init__(self, scaling: ScalingConfig = BOUNDS, attention: int = 1, experts: int = 2, **more: str) -> None:
        self.scaler = Autoscaler(scaling, attention, experts, **more)  # type: ignore[arg-type]
        self.attention, self.experts = attention, experts
        self.now_s = 1000.0
        self.goals: list[Goal] = []

    def run(self, seconds: int, seen: Observation | Callable[["Pipeline"], Observation], follows: bool = True) -> Goal:
        for _ in range(seconds):
            self.now_s += 1.0
            load = seen if isinstance(seen, Observation) else seen(self)
            load = replace(load, attention_ranks=self.attention, expert_ranks=self.experts)
            goal = self.scaler.observe(load, self.now_s)
            self.goals.append(goal)
            if follows:
                self.attention, self.experts = goal.attention_ranks, goal.expert_ranks
        return self.goals[-1]

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Goals as (attention, experts), each once."""
        pairs = [(goal.attention_ranks, goal.expert_ranks) for goal in self.goals]
        return [pair for i, pair in enumerate(pairs) if i == 0 or pair != pairs[i - 1]]


def test_without_bounds_nothing_scales() -> None:
    pipeline = Pipeline(ScalingConfig(), attention=2, experts=3)
    scaler: Scaler = pipeline.scaler
    pipeline.run(400, replace(WAITING, kv_used_fraction=1.0))
    pipeline.run(400, IDLE)
    assert pipeline.counts == [(2, 3)] and pipeline.goals[-1].why == "as configured"
    assert scaler.rebalances and scaler.rebalance_interval_s == 10.0


def test_requests_that_wait_bring_an_expert_rank_after_the_delay_then_another() -> None:
    pipeline = Pipeline()
    assert pipeline.run(10, WAITING).expert_ranks == 2
    goal = pipeline.run(1, WAITING)
    assert goal.expert_ranks == 3 and goal.why == "3 expert ranks: requests wait 3.0 s, the target is 1 s"
    assert pipeline.run(10, WAITING).expert_ranks == 3
    assert pipeline.run(1, WAITING).expert_ranks == 4
    pipeline.run(100, WAITING)
    assert pipeline.counts == [(1, 2), (1, 3), (1, 4)]


def test_a_need_that_pauses_starts_again() -> None:
    pipeline = Pipeline()
    for _ in range(20):
        pipeline.run(10, WAITING)
        pipeline.run(1, replace(WAITING, num_queued=0, queue_s=0.0))
    assert pipeline.counts == [(1, 2)]


def test_a_need_before_and_after_a_gap_is_no_lasting_need() -> None:
    pipeline = Pipeline()
    pipeline.run(5, WAITING)
    pipeline.now_s += 60.0
    assert pipeline.run(8, WAITING).expert_ranks == 2
    assert pipeline.run(3, WAITING).expert_ranks == 3


def test_a_full_cache_and_full_seats_bring_attention_ranks() -> None:
    pipeline = Pipeline()
    goal = pipeline.run(11, replace(WAITING, kv_used_fraction=0.9))
    assert (goal.attention_ranks, goal.expert_ranks) == (2, 2)
    assert goal.why == "2 attention ranks: 90% of the KV cache is used, the target is 80%"
    goal = pipeline.run(12, replace(WAITING, num_running=100))
    assert (goal.attention_ranks, goal.expert_ranks) == (3, 2)
    assert goal.why == "3 attention ranks: all 100 seats are taken and 5 requests wait"


def test_where_attention_cannot_grow_experts_do() -> None:
    pipeline = Pipeline(replace(BOUNDS, min_attention=0, max_attention=0))
    assert pipeline.run(11, replace(WAITING, kv_used_fraction=0.95)).expert_ranks == 3


def test_slow_steps_bring_an_expert_rank_without_a_queue() -> None:
    slow = replace(IDLE, num_running=50, kv_used_fraction=0.5, step_ms=41.0)
    assert Pipeline().run(60, slow).expert_ranks == 2
    goal = Pipeline(replace(BOUNDS, target_step_ms=40.0)).run(11, slow)
    assert goal.expert_ranks == 3 and goal.why == "3 expert ranks: a step takes 41.0 ms, the target is 40 ms"


def test_no_further_rank_is_asked_for_while_one_is_on_its_way() -> None:
    pipeline = Pipeline()
    assert pipeline.run(11, WAITING).expert_ranks == 3
    pipeline.experts = 2
    assert pipeline.run(300, WAITING, follows=False).expert_ranks == 3
    pipeline.experts = 3
    assert pipeline.run(11, WAITING).expert_ranks == 4


def test_a_rank_that_never_came_is_given_up_when_the_load_is_over() -> None:
    pipeline = Pipeline(attention=1)
    pipeline.run(11, WAITING)
    pipeline.experts = 2
    assert pipeline.run(121, IDLE, follows=False).expert_ranks == 2


def test_idle_shrinks_to_the_least_one_rank_per_delay() -> None:
    pipeline = Pipeline(attention=3, experts=4)
    assert pipeline.run(120, IDLE).expert_ranks == 4
    goal = pipeline.run(1, IDLE)
    assert (goal.attention_ranks, goal.expert_ranks) == (2, 3)
    assert goal.why == "3 expert ranks: no queue, and 0% of seats and 0% of the KV cache used"
    pipeline.run(600, IDLE)
    assert pipeline.counts == [(3, 4), (2, 3), (1, 2), (1, 1)]


def test_no_further_rank_goes_while_one_is_on_its_way_out() -> None:
    pipeline = Pipeline(experts=4)
    assert pipeline.run(1000, IDLE, follows=False).expert_ranks == 3


@pytest.mark.parametrize(
    "busy",
    [
        replace(IDLE, num_running=35),  # 35 seats of 100 on two ranks would be 70 % on one
        replace(IDLE, kv_used_fraction=0.3),  # 30 % of 80 % likewise 75 %
        replace(IDLE, num_queued=1, queue_s=1.0),
    ],
)
def test_load_that_would_be_too_much_for_one_rank_less_keeps_it(busy: Observation) -> None:
    pipeline = Pipeline(attention=2)
    pipeline.run(500, busy)
    assert pipeline.counts == [(2, 2)]


def test_with_a_step_target_the_time_of_steps_says_how_many_experts_are_enough() -> None:
    scaling = replace(BOUNDS, target_step_ms=40.0)
    assert Pipeline(scaling).run(200, replace(IDLE, num_running=45, step_ms=13.0)).expert_ranks == 2
    assert Pipeline(scaling).run(200, replace(IDLE, num_running=45, step_ms=11.0)).expert_ranks == 1


def test_new_bounds_apply_at_once() -> None:
    pipeline = Pipeline()
    pipeline.run(1, IDLE)
    pipeline.scaler.set_bounds(replace(BOUNDS, min_experts=4, max_experts=6, rebalance=False))
    goal = pipeline.run(1, IDLE)
    assert goal == Goal(attention_ranks=1, expert_ranks=4, why="at least 4 expert ranks by the bounds")
    assert not pipeline.scaler.rebalances
    pipeline.scaler.set_bounds(replace(BOUNDS, max_experts=2, min_attention=2))
    goal = pipeline.run(1, WAITING)
    assert (goal.attention_ranks, goal.expert_ranks) == (2, 2)
    pipeline.scaler.set_bounds(ScalingConfig())
    assert pipeline.run(1, WAITING).attention_ranks == 1


@pytest.mark.parametrize(
    ("low", "high", "bounds"),
    [(0, 0, (2, 2)), (1, 0, (1, 2)), (3, 0, (3, 3)), (0, 4, (2, 4)), (0, 1, (1, 1)), (1, 4, (1, 4))],
)
def test_a_bound_of_0_is_the_layouts_own_number(low: int, high: int, bounds: tuple[int, int]) -> None:
    assert Autoscaler(ScalingConfig(min_experts=low, max_experts=high), 1, 2).bounds("expert") == bounds


def test_a_restarted_router_goes_on_from_the_ranks_that_it_finds() -> None:
    pipeline = Pipeline()
    pipeline.experts, pipeline.attention = 4, 3
    assert pipeline.run(1, WAITING).expert_ranks == 4
    beyond = Pipeline()
    beyond.experts = 7
    assert beyond.run(1, WAITING).expert_ranks == 4


def test_colocated_ranks_scale_as_one_by_the_bounds_of_experts() -> None:
    pipeline = Pipeline(replace(BOUNDS, max_attention=9), attention=2, experts=2, layout="colocated")
    goal = pipeline.run(11, replace(WAITING, kv_used_fraction=0.9))
    assert goal == Goal(
        attention_ranks=3, expert_ranks=3, why="3 expert ranks: 90% of the KV cache is used, the target is 80%"
    )
    pipeline.run(1000, IDLE)
    assert pipeline.counts == [(2, 2), (3, 3), (2, 2), (1, 1)]


@pytest.mark.parametrize("period_s", [2, 15, 60, 119])
def test_load_that_swings_around_a_target_does_not_make_ranks_come_and_go(period_s: int) -> None:
    """KV use per rank swings between half and 1.2 of the target: ranks may come, none may go."""

    def load(pipeline: Pipeline) -> Observation:
        work = 1.2 if int(pipeline.now_s) % (2 * period_s) < period_s else 0.5
        return replace(IDLE, num_running=10, kv_used_fraction=min(1.0, 0.8 * work / pipeline.attention))

    pipeline = Pipeline(replace(BOUNDS, max_experts=2, min_experts=2))
    pipeline.run(3000, load)
    assert len(pipeline.counts) <= 2 and pipeline.counts == sorted(pipeline.counts)


@pytest.mark.parametrize("work", [0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.5, 1.9, 2.4, 3.5])
def test_steady_load_settles(work: float) -> None:
    """Whatever one rank's worth of load, the number of ranks changes in one direction and then stays."""

    def load(pipeline: Pipeline) -> Observation:
        return replace(
            IDLE,
            num_running=10,
            kv_used_fraction=min(1.0, 0.8 * work / pipeline.attention),
            step_ms=40.0 * work / pipeline.experts,
        )

    for start in (1, 3):
        pipeline = Pipeline(replace(BOUNDS, target_step_ms=40.0), attention=start, experts=start)
        pipeline.run(2000, load)
        for side in zip(*pipeline.counts, strict=True):
            assert list(side) in (sorted(side), sorted(side, reverse=True))
        settled = pipeline.counts[-1]
        pipeline.run(500, load)
        assert pipeline.counts[-1] == settled


observations = st.builds(
    Observation,
    num_queued=st.integers(0, 3),
    queue_s=st.sampled_from([0.0, 1.0, 5.0]),
    num_running=st.integers(0, 100),
    num_seats=st.sampled_from([0, 100]),
    kv_used_fraction=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    step_ms=st.sampled_from([0.0, 10.0, 50.0]),
    attention_ranks=st.integers(0, 4),
    expert_ranks=st.integers(0, 6),
)
scalings = st.builds(
    lambda experts, attention, delay_s: ScalingConfig(
        min_experts=min(experts),
        max_experts=max(experts),
        min_attention=min(attention),
        max_attention=max(attention),
        upscale_delay_s=delay_s,
        downscale_delay_s=2 * delay_s,
        target_step_ms=40.0,
    ),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([0.0, 2.0]),
)


@settings(deadline=None)
@given(steps=st.lists(st.tuples(observations, st.none() | scalings), min_size=1, max_size=40), first=scalings)
def test_goals_keep_the_bounds_change_by_one_rank_and_repeat(
    steps: list[tuple[Observation, ScalingConfig | None]], first: ScalingConfig
) -> None:
    scalers = [Autoscaler(first, 1, 2) for _ in range(2)]
    scaling, before = first, None
    for second, (seen, changed) in enumerate(steps):
        for scaler in scalers if changed else ():
            scaler.set_bounds(changed)
        scaling = changed if changed else scaling
        goal, again = (scaler.observe(seen, float(second)) for scaler in scalers)
        assert goal == again and goal.why
        assert scaling.min_experts <= goal.expert_ranks <= scaling.max_experts
        assert scaling.min_attention <= goal.attention_ranks <= scaling.max_attention
        if before is not None and not changed:
            assert abs(goal.expert_ranks - before.expert_ranks) <= 1
            assert abs(goal.attention_ranks - before.attention_ranks) <= 1
        before = goal
