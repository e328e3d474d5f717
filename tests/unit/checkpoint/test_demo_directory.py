"""`demo`: the model that comes with Corral is found from anywhere, and is whole."""

import tomllib
from pathlib import Path

import pytest

from actors.checkpoint import shape_models
from actors.checkpoint.config import read_model_config
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.shape_models import resolve_model_directory
from actors.config import PipelineConfig
from actors.errors import ConfigError

ROOT = Path(__file__).parents[3]
MAX_BYTES = 16_000_000  # of everything in git


def test_the_default_model_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = resolve_model_directory(PipelineConfig().model)
    assert directory == ROOT / "deploy" / "demo-model"
    validate_checkpoint(directory)


def test_it_keeps_the_peculiarities_of_the_family_in_small() -> None:
    config = read_model_config(resolve_model_directory("demo"))
    assert (config.moe_layers, config.num_experts, config.experts_per_token) == ((1, 3, 5, 7), 16, 1)
    assert config.global_layers == (3, 7) and config.chunk_tokens == 128 and not config.use_qk_norm
    assert config.temperature_tuning and config.floor_scale < config.chunk_tokens
    assert config.queries_per_kv > 1 and not config.tie_word_embeddings


def test_an_installed_package_carries_it() -> None:
    """pyproject.toml maps the folder to where `demo` looks first, with every file that serving reads."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "actors.demo_model" in setuptools["packages"]
    folder = ROOT / setuptools["package-dir"]["actors.demo_model"]
    packed = {file.name for pattern in setuptools["package-data"]["actors.demo_model"] for file in folder.glob(pattern)}
    assert packed == {file.name for file in folder.iterdir() if file.suffix != ".svg"}
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MAX_BYTES


def test_an_installation_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_models, "_DEMO_PLACES", (tmp_path / "nowhere",))
    with pytest.raises(ConfigError, match="nowhere"):
        resolve_model_directory("demo")
