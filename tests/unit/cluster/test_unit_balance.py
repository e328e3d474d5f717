"""The planner with tensor-parallel attention: units stay whole, shards stay where they are, and their number stays."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from actors.config import ScalingConfig
from actors.errors import LayoutError
from actors.router.membership import Goal, Observation
from actors.types import EMPTY_SLOT, RankSpec
from cluster.autoscale import Autoscaler
from cluster.balance import TOKENS_TO_JUDGE, Balancer

E = EMPTY_SLOT


def planner(num_experts: int, num_slots: int, tp: int, replicas: int = 1) -> Balancer:
    return Balancer(
        layout="colocated", moe_layers=(1, 3), num_experts=num_experts, num_slots=num_slots, replicas=replicas,
        attention_tp=tp,
    )  # fmt: skip


def check_unit(ranks: Sequence[RankSpec], tp: int, num_experts: int) -> None:
    assert sorted(spec.shard for spec in ranks) == [(i, tp) for i in range(tp)]
    (leader,) = [spec.rank for spec in ranks if spec.leads]
    assert all(spec.unit == leader and spec.leads == (spec.shard[0] == 0) for spec in ranks)
    assert [spec.rank for spec in ranks] == sorted(spec.rank for spec in ranks)
    for layer in (1, 3):
        held = [expert for spec in ranks for expert in spec.slots[layer] if expert != EMPTY_SLOT]
        assert set(held) == set(range(num_experts)), "an expert has no holder"


@settings(max_examples=100, deadline=None)
@given(
    tp=st.integers(2, 4),
    num_experts=st.integers(1, 9),
    spare=st.integers(0, 2),
    asked=st.integers(1, 6),
    skew=st.lists(st.sampled_from([1.0, 30.0]), min_size=9, max_size=9),
    data=st.data(),
)
def test_whatever_happens_the_unit_is_whole(
    tp: int, num_experts: int, spare: int, asked: int, skew: list[float], data: st.DataObject
) -> None:
    balancer = planner(num_experts, -(-num_experts // tp) + spare, tp)
    goal = Goal(attention_ranks=asked, expert_ranks=asked)
    ranks = balancer.first(goal, 0)
    check_unit(ranks, tp, num_experts)
    tokens = {layer: [TOKENS_TO_JUDGE * 10 * w for w in skew[:num_experts]] for layer in (1, 3)}
    next_rank = tp
    for _ in range(4):
        lost_numbers = data.draw(st.sets(st.sampled_from([spec.rank for spec in ranks])))
        survivors = [spec for spec in ranks if spec.rank not in lost_numbers]
        lost = [spec for spec in ranks if spec.rank in lost_numbers]
        recovered = balancer.recover(survivors, lost, next_rank)
        check_unit(recovered, tp, num_experts)
        assert {s.rank: s.shard for s in recovered if s.rank < next_rank} == {s.rank: s.shard for s in survivors}
        assert len([spec for spec in recovered if spec.rank >= next_rank]) == len(lost)
        ranks, next_rank = recovered, next_rank + len(lost)
        for _ in range(40):
            proposal = balancer.propose(ranks, goal, tokens, next_rank)
            if proposal is None:
                break
            check_unit(proposal.ranks, tp, num_experts)
            assert [(s.rank, s.shard, s.leader) for s in proposal.ranks] == [(s.rank, s.shard, s.leader) for s in ranks]
            ranks = proposal.ranks
        else:
            raise AssertionError("no end to it")


@settings(max_examples=50, deadline=None)
@given(tp=st.integers(2, 4), num_experts=st.integers(1, 5), data=st.data())
def test_slices_stay_where_they_are_and_come_back(tp: int, num_experts: int, data: st.DataObject) -> None:
    balancer = Balancer(
        layout="colocated", moe_layers=(1, 3), num_experts=num_experts, num_slots=num_experts, attention_tp=tp,
        expert_tp=tp,
    )  # fmt: skip
    goal, everything = Goal(attention_ranks=tp, expert_ranks=tp), tuple(range(num_experts))
    ranks, next_rank = balancer.first(goal, 0), tp
    tokens = {layer: [TOKENS_TO_JUDGE * 100.0] + [1.0] * (num_experts - 1) for layer in (1, 3)}
    for _ in range(4):
        check_unit(ranks, tp, num_experts)
        assert all(spec.expert_shard == spec.shard for spec in ranks)
        assert all(spec.slots == {1: everything, 3: everything} for spec in ranks)
        assert balancer.propose(ranks, goal, tokens, next_rank) is None and balancer.problem(ranks, goal) == ""
        lost_numbers = data.draw(st.sets(st.sampled_from([spec.rank for spec in ranks])))
        survivors = [spec for spec in ranks if spec.rank not in lost_numbers]
        lost = [spec for spec in ranks if spec.rank in lost_numbers]
        ranks = balancer.recover(survivors, lost, next_rank)
        kept = {spec.rank: spec for spec in ranks}
        assert all(structs.replace(kept[spec.rank], leader=spec.leader) == spec for spec in survivors)
        next_rank += len(lost)


def test_slices_are_of_one_unit_and_have_no_replicas() -> None:
    for keys in ({"attention_tp": 4}, {"attention_tp": 2, "replicas": 2}):
        with pytest.raises(LayoutError, match="2 slices of"):
            Balancer(layout="colocated", moe_layers=(1,), num_experts=4, num_slots=4, expert_tp=2, **keys)


def test_the_leader_is_the_rank_with_the_first_shard_whatever_its_number() -> None:
    balancer = planner(4, 2, 2)
    first, second = balancer.first(Goal(attention_ranks=2, expert_ranks=2), 0)
    ranks = balancer.recover([second], [first], 7)
    assert [(spec.rank, spec.shard, spec.leader) for spec in ranks] == [(1, (1, 2), 7), (7, (0, 2), -1)]


def test_of_two_ranks_with_one_shard_the_older_stays_and_other_divisions_go() -> None:
    """As a router finds them that takes over in the middle of a change, or with another configuration."""
    balancer = planner(4, 2, 2)
    first, second = balancer.first(Goal(attention_ranks=2, expert_ranks=2), 0)
    twin = RankSpec(rank=5, roles=second.roles, slots=second.slots, shard=(1, 2), leader=0)
    other = RankSpec(rank=6, roles=second.roles, slots=second.slots, shard=(2, 4), leader=0)
    assert balancer.recover([first, second, twin, other], [], 9) == (first, second)


def test_spare_slots_get_replicas_of_hot_experts() -> None:
    balancer = planner(4, 3, 2)
    ranks = balancer.first(Goal(attention_ranks=2, expert_ranks=2), 0)
    tokens = {layer: [90_000.0, 1000.0, 1000.0, 1000.0] for layer in (1, 3)}
    proposal = balancer.propose(ranks, Goal(attention_ranks=2, expert_ranks=2), tokens, 2)
    assert proposal is not None
    check_unit(proposal.ranks, 2, 4)
    assert sum(0 in spec.slots[1] for spec in proposal.ranks) == 2


def test_other_layouts_have_no_units() -> None:
    with pytest.raises(LayoutError, match="needs the layout colocated"):
        Balancer(layout="disaggregated", moe_layers=(1,), num_experts=4, num_slots=4, attention_tp=2)


def test_the_number_of_ranks_is_not_scaled() -> None:
    scaling = ScalingConfig(min_experts=1, max_experts=8, upscale_delay_s=0.0, target_queue_s=0.1)
    scaler = Autoscaler(scaling, 4, 4, "colocated", is_fixed=True)
    busy = Observation(
        num_queued=99, queue_s=50.0, num_running=8, num_seats=8, kv_used_fraction=1.0, step_ms=50.0,
        attention_ranks=4, expert_ranks=4,
    )  # fmt: skip
    goals = [scaler.observe(busy, float(now_s)) for now_s in range(5)]
    assert {(goal.attention_ranks, goal.expert_ranks) for goal in goals} == {(4, 4)}
