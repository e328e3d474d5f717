"""Which quantizations are served, which parts of a model they are of, and what is refused by name."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.checkpoint.config import parse_model_config, read_model_config
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.make_model import make_model, write_description
from actors.checkpoint.quantization import Quantization, parse_quantization
from actors.checkpoint.shapes import SHAPES, StoredExperts, config_json, named_shape
from actors.errors import CheckpointError, ConfigError

FFN = ["model.layers.1.feed_forward.shared_expert.gate_proj", "model.layers.0.feed_forward.gate_proj"]
Edit = Callable[[Path, Callable[[dict[str, Tensor]], object]], None]


def stated(stored: StoredExperts) -> dict[str, Any]:
    values: dict[str, Any] = copy.deepcopy(config_json(SHAPES["tiny-wide"], experts=stored)["quantization_config"])
    return values


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("fp8", Quantization("fp8", False)),
        ("fp8_ffn", Quantization("fp8", True)),
        ("int4", Quantization("int4", True)),
        ("fused_fp8", Quantization("fp8", False)),
    ],
)
def test_what_we_write_is_what_we_read(stored: StoredExperts, expected: Quantization) -> None:
    assert parse_quantization(stated(stored), FFN) == expected
    assert parse_quantization({}, FFN) == Quantization("plain", False)


def test_modules_are_ignored_by_name_by_pattern_and_with_the_prefix() -> None:
    values = stated("fp8_ffn")
    for ignored, includes_ffn in (
        ([], True),
        (["lm_head", "re:.*self_attn"], True),
        (["re:.*shared_expert.*"], False),
        (["language_model." + FFN[0]], False),
        (["re:model[.]layers[.]0[.]feed_forward[.]"], False),
        (["re:shared_expert"], True),  # patterns begin where names begin
    ):
        assert parse_quantization(values | {"ignore": ignored}, FFN).includes_ffn == includes_ffn, ignored


@pytest.mark.parametrize(
    ("stored", "part", "changes", "problem"),
    [
        ("int4", "weights", {"symmetric": False}, "weights have symmetric False, which must be True"),
        ("int4", "weights", {"group_size": 32}, "weights have group_size 32, which must be 128"),
        ("int4", "weights", {"strategy": "channel", "group_size": None}, "weights have strategy 'channel'"),
        ("int4", "weights", {"num_bits": 8}, "weights have num_bits 8, which must be 4"),
        ("int4", "weights", {"actorder": "group"}, "actorder 'group'"),
        ("int4", "input_activations", {"num_bits": 8, "type": "int"}, "input_activations beside 4-bit weights"),
        ("fp8", "weights", {"strategy": "tensor"}, "weights have strategy 'tensor', which must be 'channel'"),
        ("fp8", "weights", {"strategy": "block", "block_structure": [128, 128]}, "weights have strategy 'block'"),
        ("fp8", "input_activations", {"dynamic": False}, "input_activations have dynamic False, which must be True"),
        ("fp8", "input_activations", {"strategy": "tensor"}, "input_activations have strategy 'tensor'"),
    ],
)
def test_other_schemes_are_refused(
    tmp_path: Path, stored: StoredExperts, part: str, changes: dict[str, Any], problem: str
) -> None:
    values = config_json(SHAPES["tiny-wide"], experts=stored)
    quantization = copy.deepcopy(values["quantization_config"])
    group = quantization["config_groups"]["group_0"]
    group[part] = (group[part] or {}) | changes
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    with pytest.raises(CheckpointError) as caught:
        read_model_config(tmp_path)
    assert problem in caught.value.problem


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"quant_method": "modelopt"}, "'modelopt'"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ({"format": "marlin-24"}, "'marlin-24'"),
        ({"config_groups": {}}, "config_groups does not say"),
        ({"config_groups": {"a": None}}, "config_groups does not say"),
        ({"config_groups": {"a": {}}}, "weights have num_bits None"),
        ({"ignore": ["re:("]}, "has a pattern that is none"),
    ],
)
def test_other_methods_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_quantization(stated("int4") | changes, FFN)


def test_reordering_that_needs_no_table_is_the_plain_format() -> None:
    values = stated("int4")
    values["config_groups"]["group_0"]["weights"]["actorder"] = "weight"
    assert parse_quantization(values, FFN).form == "int4"


def test_int4_wants_whole_groups() -> None:
    with pytest.raises(ValueError, match=r"whole groups of 128; there are \[96, 64, 128\]"):
        parse_model_config(config_json(SHAPES["tiny"], experts="int4"))


@pytest.mark.parametrize(("stored", "announced"), [("fp8_ffn", "fp8"), ("fp8", "fp8_ffn")])
@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_stored_counts_and_not_the_ignore_list(
    tmp_path: Path, stored: StoredExperts, announced: StoredExperts, shards: int
) -> None:
    make_model(tmp_path, SHAPES["tiny-wide"], experts=stored, shards=shards)
    config = config_json(SHAPES["tiny-wide"], experts=announced)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path).quantizes_ffn == (stored == "fp8_ffn")
    validate_checkpoint(tmp_path)
    assert parse_model_config(config).quantizes_ffn == (announced == "fp8_ffn")


def test_without_weights_the_config_says_which_parts(tmp_path: Path) -> None:
    write_description(tmp_path, SHAPES["tiny-wide"], experts="int4")
    assert read_model_config(tmp_path).quantizes_ffn


@pytest.mark.parametrize(
    ("stored", "added", "problem"),
    [
        ("int4", "weight_zero_point", "asymmetric"),
        ("int4", "weight_g_idx", "reorders columns"),
        ("fp8", "input_scale", "static activation scales"),
    ],
)
def test_tensors_of_other_schemes_are_named(
    tmp_path: Path, edit: Edit, stored: StoredExperts, added: str, problem: str
) -> None:
    make_model(tmp_path, SHAPES["tiny-wide"], experts=stored)
    name = f"model.layers.1.feed_forward.experts.0.up_proj.{added}"

    def add(tensors: dict[str, Tensor]) -> None:
        if "model.norm.weight" in tensors:
            tensors[name] = torch.zeros(4)

    edit(tmp_path, add)
    with pytest.raises(CheckpointError, match=problem) as caught:
        validate_checkpoint(tmp_path)
    assert caught.value.tensor == name


@pytest.mark.parametrize(("stored", "announced"), [("int4", "fp8"), ("fp8", "int4"), ("fused_fp8", "int4")])
def test_another_form_than_was_announced(tmp_path: Path, stored: StoredExperts, announced: StoredExperts) -> None:
    make_model(tmp_path, SHAPES["tiny-wide"], experts=stored)
    (tmp_path / "config.json").write_text(json.dumps(config_json(SHAPES["tiny-wide"], experts=announced)))
    with pytest.raises(CheckpointError, match=f"announces {announced}, but the experts .* are stored as"):
        validate_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "stored"),
    [
        ("scout-fp8", "scout", "fp8_ffn"),
        ("scout-int4", "scout", "int4"),
        ("maverick-fp8", "maverick", "fp8"),
        ("maverick", "maverick", "fused"),
        ("tiny-scout", "tiny-scout", "fused"),
        ("tiny-wide-int4", "tiny-wide", "int4"),
    ],
)
def test_forms_by_name(name: str, shape: str, stored: str) -> None:
    assert named_shape(name) == (SHAPES[shape], stored)


@pytest.mark.parametrize("name", ["huge", "huge-fp8", "scout-int8", "fp8", ""])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="is not known; known are bench-maverick"):
        named_shape(name)
