"""Which pipelines may take over each other's ranks."""

from dataclasses import replace

import pytest

from actors.config import PipelineConfig, ScalingConfig
from actors.errors import ConfigError

CONFIG = PipelineConfig(model="/models/a")


@pytest.mark.parametrize("change", [{"expert_ranks": 4}, {"expert_slots": 9}, {"step_timeout_s": 3.0},
                                    {"served_model_name": "b"}, {"max_queued_requests": 5}])  # fmt: skip
def test_how_many_and_how_long_says_nothing_of_what_ranks_hold(change: dict[str, object]) -> None:
    assert replace(CONFIG, **change).contents == CONFIG.contents  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"model": "/models/b"}, {"dtype": "bfloat16"}, {"page_tokens": 32},
                                    {"layout": "colocated"}, {"expert_resources": {"big": 1.0}}])  # fmt: skip
def test_what_ranks_hold_and_where_they_are_tells_pipelines_apart(change: dict[str, object]) -> None:
    assert replace(CONFIG, **change).contents != CONFIG.contents  # type: ignore[arg-type]


def test_slow_ranks_are_not_told_by_less_than_noise() -> None:
    assert ScalingConfig.parse({"slow_rank_factor": 0}).slow_rank_factor == 0
    with pytest.raises(ConfigError, match="slow_rank_factor"):
        ScalingConfig.parse({"slow_rank_factor": 1.2})
