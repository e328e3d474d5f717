"""Where experts come from when no peer gives them: the checkpoint, or random numbers.

Owns what makes two ranks' experts the same experts. Knows nothing of slots.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.index import CheckpointIndex, validate_checkpoint
from actors.checkpoint.layouts.rules import ExpertTarget
from actors.checkpoint.reader import Progress
from actors.checkpoint.shard import WHOLE, Shard
from actors.checkpoint.weights import make_expert, read_experts
from actors.config import PipelineConfig

DUMMY_SEED = 0

Wanted = Sequence[tuple[int, int, ExpertTarget]]
"""(layer, expert, where to) of each."""


class Origin(Protocol):
    """Gives any expert of the model, or always the same slice of it, as it is stored."""

    @property
    def name(self) -> str:
        """The same on two ranks if and only if their experts are the same, up to the dtype."""
        ...

    def fill(self, wanted: Wanted, progress: Progress) -> None:
        """Fills all targets. Work may still be queued on the current CUDA stream. Raises CheckpointError."""
        ...


class CheckpointOrigin:
    """Reads safetensors; the directory is looked at when it is first needed."""

    def __init__(self, directory: str, shard: Shard = WHOLE) -> None:
        self.name = f"checkpoint {directory}{_slice_name(shard)}"
        self._directory = Path(directory)
        self._shard = shard
        self._index: CheckpointIndex | None = None

    def fill(self, wanted: Wanted, progress: Progress) -> None:
        if self._index is None:
            self._index = validate_checkpoint(self._directory)
        read_experts(self._index, wanted, progress, self._shard)


class DummyOrigin:
    """Makes random experts, the same for the same seed and kind of device."""

    def __init__(self, config: ModelConfig, directory: str, seed: int, shard: Shard = WHOLE) -> None:
        self.name = f"dummy {directory} {seed}{_slice_name(shard)}"
        self._config = config
        self._seed = seed
        self._shard = shard

    def fill(self, wanted: Wanted, progress: Progress) -> None:
        sizes = [_num_bytes(target) for _, _, target in wanted]
        for idx, (layer, expert, target) in enumerate(wanted):
            make_expert(self._config, layer, expert, target, self._seed, self._shard)
            progress(sum(sizes[: idx + 1]), sum(sizes))


def make_origin(config: ModelConfig, pipeline: PipelineConfig, shard: Shard = WHOLE) -> Origin:
    """Of `shard` of every expert."""
    if pipeline.load == "dummy":
        return DummyOrigin(config, pipeline.model, DUMMY_SEED, shard)
    return CheckpointOrigin(pipeline.model, shard)


def _slice_name(shard: Shard) -> str:
    return f" part {shard.index} of {shard.of}" if shard.of > 1 else ""


def _num_bytes(target: ExpertTarget) -> int:
    return sum(weight.numel() * weight.element_size() for weight in (target.gate_up_ND, target.down_DF))
