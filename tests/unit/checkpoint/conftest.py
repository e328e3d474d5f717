"""Small checkpoints for these tests, made once, and a way to break copies of them."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.checkpoint.make_model import make_model
from actors.checkpoint.shapes import SHAPES, ModelShape, StoredExperts

# Two layers, one of them MoE: enough for every kind of tensor.
SMALL: ModelShape = dataclasses.replace(SHAPES["tiny"], num_layers=2, num_experts=4)


@pytest.fixture(scope="session")
def small_shape() -> ModelShape:
    return SMALL


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[StoredExperts], Path]:
    """A small checkpoint by expert format, in two shards; never written to."""
    directories: dict[str, Path] = {}

    def get(experts: StoredExperts) -> Path:
        if experts not in directories:
            directories[experts] = tmp_path_factory.mktemp("made") / experts
            make_model(directories[experts], SMALL, experts=experts)
        return directories[experts]

    return get


@pytest.fixture
def copy_of(made: Callable[[StoredExperts], Path], tmp_path: Path) -> Callable[[StoredExperts], Path]:
    """A copy that a test may break."""

    def get(experts: StoredExperts) -> Path:
        return shutil.copytree(made(experts), tmp_path / f"copy-{experts}")

    return get


def edit_shards(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites each shard after `edit` and keeps the index in step with it."""
    weight_map = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors = load_file(shard)
        edit(tensors)
        save_file(tensors, shard)
        weight_map |= dict.fromkeys(tensors, shard.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def edit() -> Callable[[Path, Callable[[dict[str, Tensor]], object]], None]:
    return edit_shards
