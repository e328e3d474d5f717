"""A small checkpoint with random weights, and the demonstration model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from demo_small import SMALL, load

from actors.attention.local_model import LocalModel
from actors.checkpoint.make_model import make_model
from benchmarks.demo_model.shape import DIRECTORY
from benchmarks.demo_model.tokens import Encoder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of SMALL with random weights that make every peculiarity count."""
    directory = tmp_path_factory.mktemp("small")
    make_model(directory, SMALL, shards=1, seed=3)
    return directory


@pytest.fixture(scope="session")
def trained() -> LocalModel:
    return load(DIRECTORY)


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder.load()
