"""config.json in both spellings, its defaults, and what it may not say."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Llama4TextConfig

from actors.checkpoint.config import ModelConfig, RopeScaling, parse_model_config, read_model_config
from actors.checkpoint.shapes import SHAPES, config_json, shape_config
from actors.errors import CheckpointError


def tiny(**changes: Any) -> dict[str, Any]:
    return config_json(SHAPES["tiny"], style="old") | changes


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_spelling_parses_to_the_same_config(name: str) -> None:
    parsed = {
        parse_model_config(config_json(SHAPES[name], style=style, nested=nested))
        for style in ("old", "new")
        for nested in (False, True)
    }
    assert len(parsed) == 1


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("style", ["old", "new"])
def test_transformers_reads_the_same_values(name: str, style: Any) -> None:
    values = config_json(SHAPES[name], style=style)
    theirs, ours = Llama4TextConfig(**values), parse_model_config(values)
    assert ours == parse_model_config(theirs.to_dict())  # what transformers writes, with its own spelling
    assert list(ours.moe_layers) == theirs.moe_layers
    assert list(ours.rope_layers) == [i for i, rotates in enumerate(theirs.no_rope_layers) if rotates]
    assert list(ours.chunked_layers) == [i for i, kind in enumerate(theirs.layer_types) if kind == "chunked_attention"]


def test_maverick_as_published() -> None:
    config = shape_config(SHAPES["maverick"])
    assert config.moe_layers == tuple(range(1, 48, 2))
    assert config.global_layers == (3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (
        200000,
        (200001, 200007, 200008),
        200018,
    )
    assert not config.use_qk_norm
    assert config.rope_scaling is None
    assert config.queries_per_kv == 5


def test_scout_as_published() -> None:
    config = shape_config(SHAPES["scout"])
    assert config.moe_layers == tuple(range(48))
    assert config.use_qk_norm
    assert config.rope_scaling == RopeScaling(
        factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=8192
    )


def test_absent_keys_have_the_defaults_of_the_class() -> None:
    values = tiny()
    for key in ("attn_temperature_tuning", "floor_scale", "attn_scale", "attention_chunk_size", "no_rope_layers",
                "use_qk_norm", "rms_norm_eps", "intermediate_size_mlp"):  # fmt: skip
        del values[key]
    config, default = parse_model_config(values), Llama4TextConfig()
    assert config.temperature_tuning
    assert (config.floor_scale, config.attn_scale) == (default.floor_scale, default.attn_scale)
    assert config.chunk_tokens == default.attention_chunk_size == 8192
    assert config.use_qk_norm is default.use_qk_norm
    assert config.dense_width == default.intermediate_size_mlp
    assert config.rope_layers == (0, 1, 2, 4, 5, 6)


def test_an_empty_rope_pattern_is_the_default_pattern() -> None:
    assert parse_model_config(tiny(no_rope_layers=[])).rope_layers == (0, 1, 2, 4, 5, 6)


def test_a_one_in_no_rope_layers_means_that_the_layer_rotates() -> None:
    assert parse_model_config(tiny(no_rope_layers=[1, 0, 0, 0, 0, 0, 0, 1])).rope_layers == (0, 7)


def test_temperature_tuning_as_transformers_4_51_wrote_it() -> None:
    assert parse_model_config(tiny(attn_temperature_tuning=4)).temperature_tuning


@pytest.mark.parametrize("changes", [{"attention_chunk_size": None}, {"layer_types": ["full_attention"] * 8}])
def test_no_chunks(changes: dict[str, Any]) -> None:
    config = parse_model_config(tiny(**changes))
    assert config.chunk_tokens == 0
    assert config.global_layers == tuple(range(8))


def test_fp8_is_announced_at_either_level() -> None:
    flat = config_json(SHAPES["tiny"], experts="fp8")
    nested = config_json(SHAPES["tiny"], experts="fp8", nested=True)
    inside = config_json(SHAPES["tiny"], nested=True)
    inside["text_config"]["quantization_config"] = flat["quantization_config"]
    assert [parse_model_config(values).quantized for values in (flat, nested, inside)] == ["fp8"] * 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: 'awq'"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4"}}, "nvfp4"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size must be a number, not 'wide'"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a whole number"),
        ({"num_key_value_heads": 3}, "num_attention_heads 10"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"moe_layers": [1, 8]}, "moe_layers"),
        ({"no_rope_layers": [1, 1]}, "no_rope_layers has 2 entries for 8 layers"),
        ({"layer_types": ["chunked_attention"] * 8}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"floor_scale": 0}, "floor_scale"),
        ({"torch_dtype": "int4"}, "dtype 'int4'"),
        ({"eos_token_id": "stop"}, "eos_token_id"),
        ({"text_config": [1]}, "text_config must be an object"),
    ],
)
def test_a_config_that_makes_no_model_is_refused_by_file_and_key(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny(**changes)))
    with pytest.raises(CheckpointError) as caught:
        read_model_config(tmp_path)
    assert caught.value.file == str(tmp_path / "config.json")
    assert named in caught.value.problem


@pytest.mark.parametrize(
    ("text", "problem"), [("{", "is not JSON"), ("[]", "is not a JSON object"), ("\xff", "is not JSON")]
)
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=problem):
        read_model_config(tmp_path)


def test_no_config_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        read_model_config(tmp_path)


def read_with_generation_config(directory: Path, text: str) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(tiny()))
    (directory / "generation_config.json").write_text(text)
    return read_model_config(directory)


@pytest.mark.parametrize(("eos", "ids"), [(7, (7,)), ([7, 9], (7, 9)), (None, (513, 519, 520))])
def test_generation_config_states_what_ends_a_turn(tmp_path: Path, eos: Any, ids: tuple[int, ...]) -> None:
    assert tiny()["eos_token_id"] == [513, 519, 520]
    assert read_with_generation_config(tmp_path, json.dumps({"eos_token_id": eos})).eos_token_ids == ids


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        read_with_generation_config(tmp_path, '{"eos_token_id": "x"}')
