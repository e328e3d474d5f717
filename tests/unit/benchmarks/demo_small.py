"""A shape of the demonstration model's kind that is quick to train and to run."""

from dataclasses import replace
from pathlib import Path

from actors.attention.local_model import LocalModel
from actors.checkpoint.shapes import ModelShape
from actors.config import PipelineConfig
from benchmarks.demo_model.shape import SHAPE

SMALL: ModelShape = replace(
    SHAPE, hidden_size=48, num_heads=6, head_dim=16, expert_width=16, dense_width=32, num_experts=4, chunk_tokens=32
)


def load(directory: Path) -> LocalModel:
    """The served forward of a checkpoint."""
    return LocalModel.load(PipelineConfig.parse({"model": str(directory), "kv_cache_bytes": 16 << 20}))
