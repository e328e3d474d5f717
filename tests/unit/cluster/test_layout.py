"""The planner: every expert has its holders, what does not fit is refused with numbers, auto picks what it says."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.attention.kv_cache import plan_pages
from actors.checkpoint.shapes import SHAPES, shape_config
from actors.config import PipelineConfig
from actors.errors import LayoutError
from cluster.floors import Split, Work
from cluster.footprint import Footprint, Precision
from cluster.hardware import H200, Machines, parse_machines
from cluster.layout import assess, candidates, longest_request_tokens, place_experts, rank_specs, resolve

MAVERICK_FP8 = shape_config(SHAPES["maverick"], experts="fp8")
MAVERICK = shape_config(SHAPES["maverick"])
SCOUT = shape_config(SHAPES["scout"])
TINY = shape_config(SHAPES["tiny"])


@given(num_experts=st.integers(1, 130), num_ranks=st.integers(1, 17), data=st.data())
def test_every_expert_has_its_replicas_on_distinct_ranks_and_counts_are_even(
    num_experts: int, num_ranks: int, data: st.DataObject
) -> None:
    replicas = data.draw(st.integers(1, num_ranks))
    held = place_experts(num_experts, num_ranks, replicas)
    for expert in range(num_experts):
        assert sum(expert in experts for experts in held) == replicas
    assert all(len(set(experts)) == len(experts) for experts in held)
    sizes = [len(experts) for experts in held]
    assert len(held) == num_ranks and max(sizes) - min(sizes) <= 1


def test_128_experts_on_three_ranks() -> None:
    assert [len(experts) for experts in place_experts(128, 3)] == [43, 43, 42]
    assert place_experts(4, 2, 2) == ((0, 1, 2, 3), (0, 1, 2, 3))
    assert place_experts(3, 2) == ((0, 1), (2,))


def test_more_replicas_than_ranks_are_refused() -> None:
    with pytest.raises(LayoutError, match="3 replicas"):
        place_experts(8, 2, 3)


@pytest.mark.parametrize(
    ("split", "roles"),
    [
        (Split(layout="single"), [("attention", "expert")]),
        (Split(layout="colocated", attention_ranks=2, expert_ranks=2), [("attention", "expert")] * 2),
        (
            Split(layout="disaggregated", attention_ranks=2, expert_ranks=3),
            [("attention",)] * 2 + [("expert",)] * 3,
        ),
    ],
)
def test_ranks_have_their_roles_and_every_moe_layer_its_slots(split: Split, roles: list[tuple[str, ...]]) -> None:
    specs = rank_specs(split, TINY)
    assert [spec.roles for spec in specs] == roles
    assert [spec.rank for spec in specs] == list(range(len(roles)))
    for spec in specs:
        assert set(spec.slots) == (set(TINY.moe_layers) if "expert" in spec.roles else set())
    for layer in TINY.moe_layers:
        held = [expert for spec in specs for expert in spec.slots.get(layer, ())]
        assert sorted(held) == list(range(TINY.num_experts))


def test_auto_on_a_cpu_is_single_and_leaves_nothing_open() -> None:
    plan = resolve(PipelineConfig(), TINY, _cpu())
    assert plan.pipeline.layout == "single" and plan.pipeline.device == "cpu"
    assert plan.pipeline.max_model_len == TINY.max_position_embeddings
    assert plan.pipeline.threads_per_rank == 2
    assert TINY.chunk_tokens % plan.pipeline.page_tokens == 0


def test_auto_with_rank_counts_is_disaggregated_and_shares_the_cores() -> None:
    plan = resolve(PipelineConfig(attention_ranks=1, expert_ranks=2), TINY, _cpu())
    assert str(plan.split) == "1A+2E" and plan.pipeline.threads_per_rank == 1


def test_auto_colocates_on_one_host_and_disaggregates_over_several() -> None:
    one = resolve(PipelineConfig(gpu_memory_utilization=0.95), MAVERICK_FP8, parse_machines("4xH200"))
    assert str(one.split) == "colocated 4 TP4 sliced"
    assert (one.pipeline.attention_tp, one.pipeline.expert_tp, one.pipeline.expert_slots) == (4, 4, 128)
    several = resolve(PipelineConfig(), MAVERICK_FP8, parse_machines("2x8xH200"))
    assert several.pipeline.layout == "disaggregated"
    assert several.split.attention_ranks + several.split.expert_ranks == 16


@pytest.mark.parametrize(("attention_tp", "weight_gb", "kv_tokens"), [(1, 125.0, 256_951), (4, 105.4, 655_000)])
def test_official_maverick_fp8_on_4xh200(attention_tp: int, weight_gb: float, kv_tokens: int) -> None:
    """Routed experts alone are FP8. Per GPU 96.6 GB of experts and 28.4 GB of the rest, of which a shard has a quarter
    but for the embedding (2.07 GB); KV in what 95 % of the memory less 5 GB leaves: 192 KiB per token, or a quarter.
    """
    pipeline = PipelineConfig(
        layout="colocated", attention_ranks=4, attention_tp=attention_tp, gpu_memory_utilization=0.95
    )
    plan = resolve(pipeline, MAVERICK_FP8, parse_machines("4xH200"))
    assert max(plan.weight_bytes) == pytest.approx(weight_gb * 1e9, rel=0.01)
    assert plan.chosen.kv_tokens == pytest.approx(kv_tokens, rel=0.01)
    assert plan.footprint.total_bytes == pytest.approx(414.9e9, rel=0.01)


def test_ranks_of_slices_hold_a_part_of_every_expert() -> None:
    plan = resolve(PipelineConfig(attention_tp=4, expert_tp=4), MAVERICK_FP8, parse_machines("4xH200"))
    assert [(spec.shard, spec.expert_shard) for spec in plan.ranks] == [((i, 4), (i, 4)) for i in range(4)]
    assert all(slots == tuple(range(128)) for spec in plan.ranks for slots in spec.slots.values())
    whole = resolve(PipelineConfig(attention_tp=4), MAVERICK_FP8, parse_machines("4xH200"))
    assert plan.weight_bytes[0] == pytest.approx(whole.weight_bytes[0], rel=0.001)  # but for scales, that is a quarter
    assert whole.pipeline.expert_tp == 1 and all(spec.expert_shard == (0, 1) for spec in whole.ranks)


@pytest.mark.parametrize("target_batch", [1, 32, 256])
def test_auto_chooses_for_the_batch_that_is_aimed_at(monkeypatch: pytest.MonkeyPatch, target_batch: int) -> None:
    """Whichever layout has the lowest floor there: here whole experts are made to win small batches."""

    def floor_s(footprint: object, machines: object, split: Split, work: Work) -> float:
        return 1.0 + (work.num_tokens if split.expert_tp == 1 else 64)

    monkeypatch.setattr("cluster.layout.step_floor_s", floor_s)
    plan = resolve(PipelineConfig(target_batch=target_batch), MAVERICK_FP8, parse_machines("4xH200"))
    assert (plan.split.expert_tp > 1) == (target_batch > 64)
    assert f"at {target_batch} requests" in plan.reason
    asked = {str(c.split) for c in candidates(plan.pipeline, plan.footprint, plan.machines)}
    assert asked == {str(plan.split)}, "what was resolved stays so"


def test_replicas_and_spare_slots_rule_slices_out() -> None:
    for keys in ({"expert_replicas": 2}, {"expert_slots": 5}):
        plan = resolve(PipelineConfig(**keys), SCOUT, parse_machines("4xH200"))  # type: ignore[arg-type]
        assert plan.split.expert_tp == 1
        sliced = Split(layout="colocated", attention_ranks=4, expert_ranks=4, attention_tp=4, expert_tp=4)
        assert "no replicas or spare slots" in assess(sliced, plan.pipeline, plan.footprint, plan.machines).problem


def test_ranks_that_share_an_attention_are_one_unit() -> None:
    plan = resolve(PipelineConfig(attention_tp=2), TINY, _cpu())
    assert str(plan.split) == "colocated 2 TP2"
    assert [(spec.shard, spec.leader, spec.leads) for spec in plan.ranks] == [((0, 2), -1, True), ((1, 2), 0, False)]
    assert plan.pipeline.attention_ranks == plan.pipeline.expert_ranks == plan.pipeline.attention_tp == 2
    alone = resolve(PipelineConfig(layout="colocated", attention_ranks=2), TINY, _cpu())
    assert plan.chosen.pools.global_pages == pytest.approx(2 * alone.chosen.pools.global_pages, abs=2)
    assert plan.chosen.kv_tokens == pytest.approx(alone.chosen.kv_tokens, rel=0.01)  # two units, each half the tokens
    assert plan.weight_bytes[0] < alone.weight_bytes[0]


@pytest.mark.parametrize(
    ("pipeline", "machines", "problem"),
    [
        (PipelineConfig(attention_tp=3), "cpu", "10 attention heads cannot be divided by 3"),
        (
            PipelineConfig(attention_tp=2, layout="disaggregated"),
            "cpu",
            "needs the layout colocated, not disaggregated",
        ),
        (PipelineConfig(attention_tp=2, attention_ranks=4), "cpu", "attention_ranks is 4"),
        (PipelineConfig(attention_tp=2, expert_ranks=3), "cpu", "expert_ranks is 3"),
        (PipelineConfig(attention_tp=2, expert_tp=2, expert_slots=9), "cpu", "no replicas or spare slots"),
    ],
)
def test_what_cannot_share_an_attention_is_refused(pipeline: PipelineConfig, machines: str, problem: str) -> None:
    with pytest.raises(LayoutError, match=problem):
        resolve(pipeline, TINY, parse_machines(machines))


def test_an_attention_is_not_shared_over_hosts() -> None:
    with pytest.raises(LayoutError, match="need GPUs of one host"):
        resolve(PipelineConfig(attention_tp=4), SCOUT, Machines(accelerator=H200, count=4, per_host=2))


@pytest.mark.parametrize(
    ("pipeline", "machines", "problem"),
    [
        (
            PipelineConfig(),
            "2xH200",
            r"415\.\d GB of.*1A\+1E: .* 386\.8 GB, usable are 130\.1",
        ),
        (PipelineConfig(layout="colocated", attention_ranks=8), "4xH200", "needs 8 GPUs, there are 4"),
        (PipelineConfig(layout="disaggregated", attention_ranks=2, expert_ranks=2), "4xH200", r"193\.\d GB"),
        (
            PipelineConfig(layout="colocated", attention_ranks=8, max_model_len=10**6, gpu_memory_utilization=0.6),
            "8xH200",
            "needed are 1,000,000",
        ),
        (PipelineConfig(max_model_len=2_000_000), "8xH200", "above the model's 1,048,576"),
        (PipelineConfig(layout="colocated", attention_ranks=4, kv_cache_bytes=20 * 10**9), "4xH200", "kv_cache_bytes"),
        (PipelineConfig(layout="disaggregated", expert_ranks=2, expert_replicas=3), "8xH200", "3 replicas"),
        (PipelineConfig(layout="single", expert_ranks=2), "8xH200", "single has one rank"),
        (PipelineConfig(layout="colocated", attention_ranks=2, expert_ranks=3), "8xH200", "both roles"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(pipeline: PipelineConfig, machines: str, problem: str) -> None:
    with pytest.raises(LayoutError, match=f"(?s){problem}"):
        resolve(pipeline, MAVERICK_FP8, parse_machines(machines))


def test_a_cpu_that_is_too_small_is_refused() -> None:
    with pytest.raises(LayoutError, match="all ranks need"):
        resolve(PipelineConfig(), TINY, _cpu(memory_bytes=500_000_000))


def test_weights_fill_the_ranks_as_the_slots_say() -> None:
    """Sum over ranks: dense weights once per attention rank, each expert once per replica."""
    pipeline = PipelineConfig(layout="disaggregated", attention_ranks=2, expert_ranks=4, expert_replicas=2)
    plan = resolve(pipeline, TINY, _cpu())
    footprint = plan.footprint
    num_slots = 2 * TINY.num_experts * len(TINY.moe_layers)
    assert sum(plan.weight_bytes) == 2 * footprint.attention_rank_bytes + num_slots * footprint.expert_bytes


@given(
    kv_bytes=st.integers(0, 40 * 2**30),
    page_tokens=st.sampled_from([16, 32]),
    model=st.sampled_from([MAVERICK, TINY, SCOUT]),
)
def test_the_longest_request_is_the_longest_whose_pages_fit(kv_bytes: int, page_tokens: int, model: object) -> None:
    footprint = Footprint(model=model, precision=Precision.of(model))  # type: ignore[arg-type]
    longest = longest_request_tokens(footprint, kv_bytes, page_tokens)
    assert _pages_bytes(footprint, longest, page_tokens) <= kv_bytes
    assert _pages_bytes(footprint, longest + page_tokens, page_tokens) > kv_bytes


@given(kv_bytes=st.integers(2**30, 200 * 2**30))
def test_contexts_left_open_leave_room_for_others(kv_bytes: int) -> None:
    """The context that is promised is had by one request, and chunked layers are not starved for its sake."""
    pipeline = PipelineConfig(layout="disaggregated", attention_ranks=1, expert_ranks=7, kv_cache_bytes=kv_bytes)
    machines = parse_machines("8xH200")
    try:
        plan = resolve(pipeline, MAVERICK_FP8, machines)
    except LayoutError:
        assert kv_bytes > 100 * 10**9
        return
    pools, page_tokens = plan.chosen.pools, plan.pipeline.page_tokens
    assert pools.global_pages * page_tokens >= plan.pipeline.max_model_len
    live_tokens = min(plan.pipeline.max_model_len, MAVERICK_FP8.chunk_tokens)
    assert pools.chunked_pages * page_tokens >= live_tokens
    assert pools.chunked_pages * 5 >= pools.global_pages or pools.chunked_pages * page_tokens < 2 * live_tokens
    # The rank divides its KV by the context that the plan settled, and comes to the same pages.
    assert pools == plan_pages(MAVERICK_FP8, page_tokens, kv_bytes, plan.pipeline.max_model_len, 2)


def _pages_bytes(footprint: Footprint, num_tokens: int, page_tokens: int) -> int:
    model = footprint.model
    pages = -(-num_tokens // page_tokens)
    chunked_pages = min(pages, model.chunk_tokens // page_tokens)
    per_layer = page_tokens * footprint.kv_bytes_per_token(num_layers=1)
    return per_layer * (pages * len(model.global_layers) + chunked_pages * len(model.chunked_layers))


def _cpu(memory_bytes: int = 16_000_000_000) -> Machines:
    machines = parse_machines("cpu")
    return replace(machines, accelerator=replace(machines.accelerator, memory_bytes=memory_bytes), cores=2)


def test_a_cpu_keeps_fp8_experts_in_the_compute_dtype() -> None:
    fp8 = resolve(PipelineConfig(), shape_config(SHAPES["tiny"], experts="fp8"), _cpu())
    assert fp8.weight_bytes == resolve(PipelineConfig(), TINY, _cpu()).weight_bytes
