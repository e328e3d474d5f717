"""One thread, small checkpoints made once, and workers over them."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from actors.checkpoint.config import ModelConfig, read_model_config
from actors.checkpoint.make_model import make_model
from actors.checkpoint.reader import Progress
from actors.checkpoint.shapes import SHAPES, ModelShape, StoredExperts
from actors.config import PipelineConfig
from actors.expert.origin import Origin, Wanted, make_origin
from actors.expert.worker import ExpertWorker

# Two MoE layers (1 and 3) of four experts.
SMALL: ModelShape = dataclasses.replace(SHAPES["tiny-wide"], num_layers=4, num_experts=4)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[StoredExperts], Path]:
    """A small checkpoint by expert format; never written to."""
    directories: dict[str, Path] = {}

    def get(stored: StoredExperts) -> Path:
        if stored not in directories:
            directories[stored] = tmp_path_factory.mktemp("experts") / stored
            make_model(directories[stored], SMALL, experts=stored, shards=1)
        return directories[stored]

    return get


@dataclasses.dataclass
class CountingOrigin:
    """An origin that remembers which experts it was asked for."""

    inner: Origin
    asked: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    def fill(self, wanted: Wanted, progress: Progress) -> None:
        self.asked += [(layer, expert) for layer, expert, _ in wanted]
        self.inner.fill(wanted, progress)


@dataclasses.dataclass
class Setup:
    """Makes workers of one model that hold nothing yet, and knows what each of them read."""

    config: ModelConfig
    pipeline: PipelineConfig
    dtype: torch.dtype

    def worker(self, device: torch.device = CPU) -> tuple[ExpertWorker, CountingOrigin]:
        origin = CountingOrigin(make_origin(self.config, self.pipeline))
        return ExpertWorker(self.config, self.dtype, device, origin), origin

    def loaded(self, slots: dict[int, tuple[int, ...]]) -> ExpertWorker:
        worker, _ = self.worker()
        worker.change(slots, {})
        return worker


@pytest.fixture
def setup(checkpoint: Callable[[StoredExperts], Path]) -> Callable[..., Setup]:
    def get(stored: StoredExperts = "fused", dtype: torch.dtype = torch.float32) -> Setup:
        directory = checkpoint(stored)
        return Setup(read_model_config(directory), PipelineConfig(model=str(directory)), dtype)

    return get
