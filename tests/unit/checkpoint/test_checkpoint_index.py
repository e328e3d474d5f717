"""A good checkpoint is accepted in every layout, and each broken one is refused by file and tensor."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.checkpoint.config import read_model_config
from actors.checkpoint.expected import expected_tensors
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.make_model import make_model
from actors.checkpoint.shapes import ConfigStyle, ModelShape, StoredExperts
from actors.errors import CheckpointError

Made = Callable[[StoredExperts], Path]
Edit = Callable[[Path, Callable[[dict[str, Tensor]], object]], None]

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def shard_of(directory: Path, name: str) -> str:
    file: str = json.loads((directory / INDEX).read_text())["weight_map"][name]
    return file


def refused(directory: Path, file: str, tensor: str | None, problem: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        validate_checkpoint(directory)
    assert (caught.value.file, caught.value.tensor) == (str(directory / file) if file else str(directory), tensor)
    assert problem in caught.value.problem


@pytest.mark.parametrize(
    ("experts", "layout"), [("fused", "fused"), ("fp8", "per_expert_fp8"), ("per_expert", "per_expert")]
)
def test_layout_is_what_the_index_holds(made: Made, experts: StoredExperts, layout: str) -> None:
    index = validate_checkpoint(made(experts))
    assert index.layout == layout
    assert set(index.tensors) == set(expected_tensors(read_model_config(made(experts)), index.layout))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("shards", [1, 5])
def test_prefix_spelling_and_shards_make_no_difference(
    made: Made, tmp_path: Path, small_shape: ModelShape, prefix: bool, style: ConfigStyle, shards: int
) -> None:
    make_model(tmp_path, small_shape, prefix=prefix, config_style=style, shards=shards)
    index, plain = validate_checkpoint(tmp_path), validate_checkpoint(made("fused"))
    assert {name: (info.shape, info.dtype) for name, info in index.tensors.items()} == {
        name: (info.shape, info.dtype) for name, info in plain.tensors.items()
    }
    assert len({info.file for info in index.tensors.values()}) == shards
    assert read_model_config(tmp_path) == read_model_config(made("fused"))


def test_offsets_are_those_of_the_safetensors_library(made: Made) -> None:
    index = validate_checkpoint(made("fp8"))
    for shard in (FIRST, SECOND):
        for name, values in load_file(made("fp8") / shard).items():
            info = index.tensors[name]
            data = (made("fp8") / shard).read_bytes()[info.begin : info.end]
            assert data == values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name


def test_vision_tensors_are_known_and_unused(copy_of: Made, edit: Edit) -> None:
    directory = copy_of("fused")

    def add_vision(tensors: dict[str, Tensor]) -> None:
        if NORM in tensors:
            tensors["vision_model.class_embedding"] = torch.zeros(8)
            tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(4, 8)

    edit(directory, add_vision)
    assert not [name for name in validate_checkpoint(directory).tensors if "vision" in name or "multi_modal" in name]


def test_tied_embeddings_need_no_head(copy_of: Made, edit: Edit) -> None:
    directory = copy_of("fused")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    edit(directory, lambda tensors: tensors.pop("lm_head.weight", None))
    assert "lm_head.weight" not in validate_checkpoint(directory).tensors


def test_neither_index_nor_file(copy_of: Made) -> None:
    directory = copy_of("fused")
    (directory / INDEX).unlink()
    refused(directory, INDEX, None, "does not exist, nor does model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(tmp_path, name, None, "only safetensors is read")


def test_pickles_beside_safetensors_are_left_alone(copy_of: Made) -> None:
    directory = copy_of("fused")
    (directory / "training_args.bin").write_bytes(b"\x80\x04.")
    validate_checkpoint(directory)


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "", None, "is not a directory")


def test_missing_shard(copy_of: Made) -> None:
    directory = copy_of("fused")
    (directory / SECOND).unlink()
    refused(directory, SECOND, None, "does not exist, but model.safetensors.index.json names it")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": 1}}', "{}"])
def test_malformed_index(copy_of: Made, text: str) -> None:
    directory = copy_of("fused")
    (directory / INDEX).write_text(text)
    refused(directory, INDEX, None, "malformed index")


def test_a_shard_outside_of_the_directory_is_not_opened(copy_of: Made) -> None:
    directory = copy_of("fused")
    (directory / INDEX).write_text(json.dumps({"weight_map": {NORM: "../other.safetensors"}}))
    refused(directory, INDEX, None, "'../other.safetensors' is not a file name")


def test_truncated_shard_names_the_first_tensor_that_is_cut(copy_of: Made) -> None:
    directory = copy_of("fused")
    last = max(
        (info for info in validate_checkpoint(directory).tensors.values() if info.file.name == SECOND),
        key=lambda info: info.end,
    )
    with (directory / SECOND).open("r+b") as file:
        file.truncate(last.end - 1)
    refused(directory, SECOND, last.name, "is truncated")


@pytest.mark.parametrize(("size_bytes", "problem"), [(0, "truncated"), (7, "truncated"), (100, "inside its header")])
def test_shard_truncated_in_its_header(copy_of: Made, size_bytes: int, problem: str) -> None:
    directory = copy_of("fused")
    with (directory / FIRST).open("r+b") as file:
        file.truncate(size_bytes)
    refused(directory, FIRST, None, problem)


def test_shard_longer_than_its_header_says(copy_of: Made) -> None:
    directory = copy_of("fused")
    with (directory / FIRST).open("ab") as file:
        file.write(b"more")
    refused(directory, FIRST, None, "4 bytes more than its header says")


def write_header(file: Path, header: object, data_bytes: int = 8) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data_bytes))


@pytest.mark.parametrize(
    ("header", "tensor", "problem"),
    [
        (b"not json", None, "malformed header"),
        (b"\xff\xfe", None, "malformed header"),
        ([], None, "malformed header"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "a", "malformed header"),
        ({"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, "a", "malformed header"),
        ({"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}, "a", "dtype 'Q4' is not known"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "a", "takes 12 bytes"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}, "a", "malformed header"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "a", "malformed header"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            },
            "b",
            "malformed header",
        ),
    ],
)
def test_malformed_header(copy_of: Made, header: object, tensor: str | None, problem: str) -> None:
    directory = copy_of("fused")
    write_header(directory / FIRST, header)
    refused(directory, FIRST, tensor, problem)


def test_a_header_of_absurd_length_is_not_read(copy_of: Made) -> None:
    directory = copy_of("fused")
    (directory / FIRST).write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(directory, FIRST, None, "it claims 1152921504606846976 bytes")


def test_tensor_that_the_index_has_and_the_shard_has_not(copy_of: Made) -> None:
    directory = copy_of("fused")
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map | {NORM: FIRST}}))
    refused(directory, FIRST, NORM, "is not in this shard")


def test_tensor_that_the_shard_has_and_the_index_has_not(copy_of: Made) -> None:
    directory = copy_of("fused")
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    del weight_map[NORM]
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(directory, SECOND, NORM, "is in this shard, but not by model.safetensors.index.json")


@pytest.mark.parametrize(
    ("experts", "name"),
    [
        ("fused", NORM),
        ("fused", "lm_head.weight"),
        ("fused", "model.layers.0.self_attn.k_proj.weight"),
        ("fused", "model.layers.0.feed_forward.down_proj.weight"),
        ("fused", "model.layers.1.feed_forward.shared_expert.up_proj.weight"),
        ("fused", "model.layers.1.feed_forward.router.weight"),
        ("fused", "model.layers.1.feed_forward.experts.down_proj"),
        ("fp8", "model.layers.1.feed_forward.experts.3.up_proj.weight"),
        ("fp8", "model.layers.1.feed_forward.experts.3.up_proj.weight_scale"),
        ("per_expert", "model.layers.1.feed_forward.experts.0.gate_proj.weight"),
    ],
)
def test_missing_tensor(copy_of: Made, edit: Edit, experts: StoredExperts, name: str) -> None:
    directory = copy_of(experts)
    edit(directory, lambda tensors: tensors.pop(name, None))
    refused(directory, "", name, "is missing from the checkpoint")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.input_layernorm.weight",  # a third layer
        "model.layers.0.feed_forward.router.weight",  # layer 0 is dense
        "model.layers.1.feed_forward.experts.4.gate_proj.weight_norm",
        "model.rotary_emb.inv_freq",
    ],
)
def test_extra_tensor(copy_of: Made, edit: Edit, name: str) -> None:
    directory = copy_of("fp8")

    def add(tensors: dict[str, Tensor]) -> None:
        if NORM in tensors:
            tensors[name] = torch.zeros(4)

    edit(directory, add)
    refused(directory, SECOND, name, "is not a tensor of this model")


def test_wrong_shape(copy_of: Made, edit: Edit) -> None:
    directory, name = copy_of("fused"), "model.layers.1.feed_forward.experts.gate_up_proj"

    def turn(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()

    edit(directory, turn)
    file = shard_of(directory, name)
    refused(directory, file, name, "has shape [4, 128, 96], the config asks for [4, 96, 128]")


@pytest.mark.parametrize(
    ("experts", "name", "dtype"),
    [
        ("fused", "model.layers.1.feed_forward.router.weight", torch.int32),
        ("fused", "model.layers.0.self_attn.q_proj.weight", torch.float8_e4m3fn),
        ("fp8", "model.layers.1.feed_forward.experts.2.down_proj.weight", torch.float8_e5m2),
        ("fp8", "model.layers.1.feed_forward.experts.2.down_proj.weight", torch.bfloat16),
    ],
)
def test_wrong_dtype(copy_of: Made, edit: Edit, experts: StoredExperts, name: str, dtype: torch.dtype) -> None:
    directory = copy_of(experts)

    def convert(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name] = tensors[name].float().to(dtype)

    edit(directory, convert)
    refused(directory, shard_of(directory, name), name, "has dtype")


def test_the_same_tensor_with_and_without_prefix(copy_of: Made, edit: Edit) -> None:
    directory = copy_of("fused")

    def double(tensors: dict[str, Tensor]) -> None:
        if NORM in tensors:
            tensors["language_model." + NORM] = tensors[NORM].clone()

    edit(directory, double)
    with pytest.raises(CheckpointError, match="is there twice"):
        validate_checkpoint(directory)


def test_scales_without_announcement(copy_of: Made, made: Made) -> None:
    directory = copy_of("fp8")
    (directory / "config.json").write_text((made("fused") / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"config\.json: .*weight_scale: .* no quantization_config"):
        validate_checkpoint(directory)


@pytest.mark.parametrize("experts", ["fused", "per_expert"])
def test_announcement_without_scales(copy_of: Made, made: Made, experts: StoredExperts) -> None:
    directory = copy_of(experts)
    (directory / "config.json").write_text((made("fp8") / "config.json").read_text())
    refused(directory, "config.json", None, "announces fp8")


def test_unknown_quantization(copy_of: Made) -> None:
    directory = copy_of("fp8")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (directory / "config.json").write_text(json.dumps(config))
    refused(directory, "config.json", None, "quantization_config: 'gptq'")


def test_a_directory_that_transformers_saved_is_accepted(tmp_path: Path, made: Made) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(made("fused")).save_pretrained(tmp_path, max_shard_size="200KB")
    index = validate_checkpoint(tmp_path)
    assert index.layout == "fused"
    assert read_model_config(tmp_path) == read_model_config(made("fused"))


def test_files_that_the_safetensors_library_saved_are_accepted(copy_of: Made) -> None:
    directory = copy_of("fp8")
    tensors: dict[str, Tensor] = {}
    for shard in (FIRST, SECOND):
        tensors |= load_file(directory / shard)
        (directory / shard).unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert set(validate_checkpoint(directory).tensors) == set(tensors)
