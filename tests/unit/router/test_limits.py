"""Limits follow the configuration, and page groups the layers that the model really has."""

import pytest

from actors.checkpoint.config import parse_model_config
from actors.config import PipelineConfig
from actors.router.limits import SchedulerLimits

SHAPE = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "vocab_size": 30,
    "intermediate_size": 8,
    "attention_chunk_size": 16,
    "max_position_embeddings": 500,
}


@pytest.mark.parametrize(
    ("num_layers", "no_rope_layers", "chunk_tokens", "has_global"),
    [(4, [1, 1, 1, 0], 16, True), (2, [1, 1], 16, False), (2, [0, 0], 0, True)],
)
def test_page_groups_without_layers_are_left_out(
    num_layers: int, no_rope_layers: list[int], chunk_tokens: int, has_global: bool
) -> None:
    model = parse_model_config({**SHAPE, "num_hidden_layers": num_layers, "no_rope_layers": no_rope_layers})
    limits = SchedulerLimits.of(PipelineConfig(page_tokens=8), model)
    assert (limits.page_tokens, limits.chunk_tokens, limits.has_global_layers) == (8, chunk_tokens, has_global)


def test_an_unset_context_length_is_the_models() -> None:
    model = parse_model_config({**SHAPE, "num_hidden_layers": 4})
    assert SchedulerLimits.of(PipelineConfig(), model).max_model_len == 500
    assert SchedulerLimits.of(PipelineConfig(max_model_len=90), model).max_model_len == 90
