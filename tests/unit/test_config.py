"""Which pipelines may take over each other's ranks."""

from dataclasses import replace

import pytest

from actors.config import PipelineConfig, ScalingConfig
from actors.errors import ConfigError

CONFIG = PipelineConfig(model="/models/a")


@pytest.mark.parametrize("change", [{"expert_ranks": 4}, {"expert_slots": 9}, {"step_timeout_s": 3.0},
                                    {"served_model_name": "b"}, {"max_queued_requests": 5},
                                    {"target_batch": 8}])  # fmt: skip
def test_how_many_and_how_long_says_nothing_of_what_ranks_hold(change: dict[str, object]) -> None:
    assert replace(CONFIG, **change).contents == CONFIG.contents  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"model": "/models/b"}, {"dtype": "bfloat16"}, {"page_tokens": 32},
                                    {"layout": "colocated"}, {"expert_resources": {"big": 1.0}},
                                    {"expert_tp": 2}])  # fmt: skip
def test_what_ranks_hold_and_where_they_are_tells_pipelines_apart(change: dict[str, object]) -> None:
    assert replace(CONFIG, **change).contents != CONFIG.contents  # type: ignore[arg-type]


def test_slow_ranks_are_not_told_by_less_than_noise() -> None:
    assert ScalingConfig.parse({"slow_rank_factor": 0}).slow_rank_factor == 0
    with pytest.raises(ConfigError, match="slow_rank_factor"):
        ScalingConfig.parse({"slow_rank_factor": 1.2})


@pytest.mark.parametrize(("keys", "problem"), [
    ({"expert_tp": 0}, "expert_tp: must be at least 1"),
    ({"expert_tp": 2}, "expert_tp: must be 1, or as many as attention_tp, which is 1"),
    ({"expert_tp": 2, "attention_tp": 4}, "expert_tp: must be 1, or as many as attention_tp, which is 4"),
    ({"expert_tp": 4, "attention_tp": 4, "expert_replicas": 2}, "expert_replicas: must be 1 with expert_tp 4"),
    ({"target_batch": 0}, "target_batch: must be at least 1"),
])  # fmt: skip
def test_slices_are_of_the_ranks_that_share_an_attention(keys: dict[str, object], problem: str) -> None:
    PipelineConfig.parse({"attention_tp": 4, "expert_tp": 4})
    with pytest.raises(ConfigError, match=problem):
        PipelineConfig.parse(keys)


def test_only_two_sides_take_turns() -> None:
    keys = {"micro_batches": 2, "micro_batch_rows": 32, "layout": "disaggregated"}
    assert PipelineConfig.parse(keys).most_whole_rows == 32
    for change in ({"layout": "colocated"}, {"micro_batches": 1}):
        assert PipelineConfig.parse(keys | change).most_whole_rows == 0
    for key, value in (("micro_batches", 3), ("micro_batch_rows", 48), ("micro_batch_rows", 4)):
        with pytest.raises(ConfigError, match=key):
            PipelineConfig.parse({key: value})
