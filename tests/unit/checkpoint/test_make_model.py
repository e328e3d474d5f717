"""Checkpoints that we write: their sizes, their tokenizer, and one directory per shape whoever asks first."""

import dataclasses
import filecmp
import itertools
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from actors.checkpoint import shape_models
from actors.checkpoint.expected import expected_tensors, num_checkpoint_bytes
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.make_model import make_model
from actors.checkpoint.shape_models import ensure_shape_model, resolve_model_directory
from actors.checkpoint.shapes import SHAPES, ModelShape, shape_config
from actors.checkpoint.tokenizer_files import build_tokenizer, special_tokens
from actors.errors import ConfigError


def num_parameters(name: str) -> int:
    config = shape_config(SHAPES[name])
    return sum(math.prod(rule.shape) for rule in expected_tensors(config, "fused").values())


# Published totals, less the vision encoder (850,960,896) and the projector (20,971,520).
@pytest.mark.parametrize(("name", "published"), [("scout", 108_641_793_536), ("maverick", 401_583_781_376)])
def test_full_shapes_have_the_published_number_of_parameters(name: str, published: int) -> None:
    assert num_parameters(name) == published - 850_960_896 - 20_971_520


def test_the_benchmark_shape_has_about_a_hundred_million() -> None:
    assert num_parameters("bench-maverick") == 100_512_256  # as the comment in shapes.py says


@pytest.mark.parametrize("name", ["tiny", "tiny-scout", "bench-maverick"])
def test_small_shapes_keep_the_peculiarities(name: str) -> None:
    shape = SHAPES[name]
    assert shape.num_heads * shape.head_dim != shape.hidden_size
    assert shape.num_heads // shape.num_kv_heads == 5
    assert shape.num_kv_heads > 1
    assert len({shape.expert_width, shape.dense_width}) == 2
    assert {shape_config(shape).is_chunked(layer) for layer in range(shape.num_layers)} == {True, False}


def test_bytes_on_disk_are_those_announced(tmp_path: Path, small_shape: ModelShape) -> None:
    for experts, layout in (("fused", "fused"), ("fp8", "per_expert_fp8")):
        make_model(tmp_path / experts, small_shape, experts=experts, dtype="bfloat16")  # type: ignore[arg-type]
        tensors = validate_checkpoint(tmp_path / experts).tensors.values()
        config = shape_config(small_shape, dtype="bfloat16")
        assert sum(info.num_bytes for info in tensors) == num_checkpoint_bytes(config, layout)  # type: ignore[arg-type]


def test_writing_streams_one_matrix_at_a_time(tmp_path: Path, small_shape: ModelShape) -> None:
    seen = [(0, 0)]
    make_model(tmp_path, small_shape, progress=lambda done, total: seen.append((done, total)))
    steps = [after[0] - before[0] for before, after in itertools.pairwise(seen)]
    config = shape_config(small_shape)
    assert min(steps) > 0
    assert max(steps) == 4 * config.vocab_size * config.hidden_size  # not four experts at once, nor a layer
    assert seen[-1][0] == seen[-1][1] == sum(i.num_bytes for i in validate_checkpoint(tmp_path).tensors.values())


@pytest.mark.parametrize("shards", [1, 2, 7, 1000])
def test_any_number_of_shards(tmp_path: Path, small_shape: ModelShape, shards: int) -> None:
    make_model(tmp_path, small_shape, shards=shards)
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    validate_checkpoint(tmp_path)
    if shards == 1:
        assert names == ["model.safetensors"]
        assert not (tmp_path / "model.safetensors.index.json").exists()
    else:
        assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
        assert 2 <= len(names) <= shards  # fewer where one tensor is more than a share


def test_seeds_and_only_seeds_make_models_differ(tmp_path: Path, small_shape: ModelShape) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_model(tmp_path / name, small_shape, seed=seed)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False) == (files, [], [])
    different = filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", files, shallow=False)[1]
    assert different == [file for file in files if file.endswith(".safetensors")]


def test_greedy_choices_have_a_margin(tmp_path: Path) -> None:
    make_model(tmp_path, SHAPES["tiny"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 512, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        best = model(ids).logits[0].topk(2).values
    margin = best[:, 0] - best[:, 1]
    assert (margin > 0.03).float().mean() > 0.95
    assert margin.median() > 0.3


# --- tokenizer ---------------------------------------------------------------------------------------------------


def test_control_tokens_have_metas_ids_at_full_size() -> None:
    ids = special_tokens(200000, 202048)
    wanted = {
        "<|begin_of_text|>": 200000, "<|end_of_text|>": 200001, "<|header_start|>": 200005, "<|header_end|>": 200006,
        "<|eom|>": 200007, "<|eot|>": 200008, "<|step|>": 200009, "<|python_start|>": 200016, "<|python_end|>": 200017,
        "<|finetune_right_pad|>": 200018, "<|image_start|>": 200080, "<|image_end|>": 200081,
        "<|tile_x_separator|>": 200084, "<|tile_y_separator|>": 200085, "<|image|>": 200090, "<|patch|>": 200092,
        "<|text_post_train_reserved_special_token_5|>": 200015, "<|text_post_train_reserved_special_token_8|>": 200019,
        "<|text_post_train_reserved_special_token_68|>": 200079, "<|vision_reserved_special_token_1047|>": 201133,
    }  # fmt: skip
    assert {name: ids[name] for name in wanted} == wanted
    assert sorted(ids.values()) == list(range(200000, 201134))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(512, 576)


def test_text_ids_come_first_then_control_tokens_then_rows_without_token(tokenizer: Tokenizer) -> None:
    specials = special_tokens(512, 576)
    assert sorted(tokenizer.get_vocab(with_added_tokens=False).values()) == list(range(512))
    assert {name: tokenizer.token_to_id(name) for name in specials} == specials
    assert min(specials.values()) == 512
    assert tokenizer.get_vocab_size() == 512 + len(specials) < 576


@pytest.mark.parametrize(
    "text",
    [
        "The horses came in.",
        "  two  spaces\n\n\nand lines\r\n",
        "1234567 don't 🐎é马 \x00\x7f",
        "",
        "ÀÉ Ωmega",
        "\t\t x",
    ],
)
def test_text_comes_back_unchanged(tokenizer: Tokenizer, text: str) -> None:
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == 512  # BOS, once
    assert all(i < 512 for i in encoded.ids[1:])
    assert tokenizer.decode(encoded.ids) == text


def test_merges_were_learnt(tokenizer: Tokenizer) -> None:
    text = "the capital of the corral is the gate of the horses"
    assert len(tokenizer.encode(text).ids) < len(text) * 0.6


def test_words_that_fill_a_large_vocabulary_decode_as_words() -> None:
    large = build_tokenizer(8128, 8192)
    assert large.decode([7000, 7001]) != ""
    assert all(large.decode([i]).strip().isalpha() and large.decode([i])[0] == " " for i in range(600, 8128, 97))


def test_too_little_room_for_control_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="room"):
        special_tokens(512, 520)
    with pytest.raises(ValueError, match="256 bytes"):
        build_tokenizer(200, 576)


def test_transformers_reads_the_tokenizer_and_renders_the_template(tmp_path: Path) -> None:
    make_model(tmp_path, dataclasses.replace(SHAPES["tiny"], num_layers=2, num_experts=2))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, PreTrainedTokenizerFast)
    assert (theirs.bos_token_id, theirs.eos_token, theirs.pad_token) == (512, "<|eot|>", "<|finetune_right_pad|>")
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]},
        {"role": "tool", "content": "12"},
    ]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nHi<|image|><|eot|>"
        "<|header_start|>ipython<|header_end|>\n\n12<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ids.count(theirs.convert_tokens_to_ids("<|eot|>")) == 3
    assert (tmp_path / "chat_template.jinja").read_text() == theirs.chat_template
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [513, 519, 520]


# --- shape:NAME --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch, small_shape: ModelShape) -> None:
    monkeypatch.setitem(SHAPES, "small", small_shape)


@pytest.mark.usefixtures("small_shapes")
def test_one_caller_makes_it_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    makes: list[Path] = []
    make = shape_models._make
    monkeypatch.setattr(
        shape_models, "_make", lambda directory, *rest: (makes.append(directory), make(directory, *rest))
    )
    with ThreadPoolExecutor(6) as pool:
        directories = set(pool.map(lambda _: ensure_shape_model("small", tmp_path), range(6)))
    assert len(directories) == len(makes) == 1
    final = directories.pop()
    validate_checkpoint(final)
    assert final.name == "small"
    assert [entry.name for entry in final.parent.iterdir() if entry.name != ".lock"] == ["small"]


def test_processes_share_one_directory(tmp_path: Path) -> None:
    """Also: another process, with other hash seeds, writes byte for byte the same model."""
    program = "import sys; from actors.checkpoint.shape_models import *; from pathlib import Path; " \
              "print(ensure_shape_model('tiny', Path(sys.argv[1])))"  # fmt: skip
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(outputs) == 1
    theirs = Path(outputs.pop())
    ours = ensure_shape_model("tiny", tmp_path / "ours")
    files = sorted(file.name for file in ours.iterdir())
    assert files == sorted(file.name for file in theirs.iterdir())
    assert filecmp.cmpfiles(ours, theirs, files, shallow=False) == (files, [], [])


@pytest.mark.usefixtures("small_shapes")
def test_a_directory_is_complete_or_absent(tmp_path: Path) -> None:
    def fail_late(done_bytes: int, total_bytes: int) -> None:
        assert not list(tmp_path.glob("*/small"))
        if done_bytes > total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_shape_model("small", tmp_path, progress=fail_late)
    assert not list(tmp_path.glob("*/small"))
    final = ensure_shape_model("small", tmp_path)  # the next caller starts afresh, and clears what was left
    validate_checkpoint(final)
    assert not list(final.parent.glob(".making-*"))


@pytest.mark.usefixtures("small_shapes")
def test_another_version_is_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_shape_model("small", tmp_path)
    monkeypatch.setattr(shape_models, "MAKER_VERSION", -1)
    assert ensure_shape_model("small", tmp_path) != first
    monkeypatch.setitem(SHAPES, "small", dataclasses.replace(SHAPES["small"], chunk_tokens=16))
    assert len({first, ensure_shape_model("small", tmp_path)}) == 2


@pytest.mark.usefixtures("small_shapes")
def test_fp8_by_name(tmp_path: Path) -> None:
    assert validate_checkpoint(ensure_shape_model("small-fp8", tmp_path)).layout == "per_expert_fp8"


def test_full_size_is_refused_but_its_description_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="801 GB of disk"):
        ensure_shape_model("maverick", tmp_path)
    assert not list(tmp_path.iterdir())
    directory = ensure_shape_model("maverick", tmp_path, with_weights=False)
    assert {file.name for file in directory.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip


def test_unknown_shape_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bench-maverick, maverick, scout, tiny"):
        resolve_model_directory("shape:huge", tmp_path)


def test_a_plain_model_is_its_directory(tmp_path: Path) -> None:
    assert resolve_model_directory(str(tmp_path)) == tmp_path
    assert resolve_model_directory("~/models/x") == Path.home() / "models" / "x"


def test_asking_for_a_model_that_is_there_needs_no_torch(tmp_path: Path) -> None:
    final = ensure_shape_model("tiny", tmp_path)
    program = "import sys; from actors.checkpoint.shape_models import *; from actors.checkpoint.index import *; " \
              "from pathlib import Path; validate_checkpoint(ensure_shape_model('tiny', Path(sys.argv[1]))); " \
              "assert 'torch' not in sys.modules, 'torch was imported'"  # fmt: skip
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    assert final.is_dir()
