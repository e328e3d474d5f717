"""The training weights as a checkpoint of the hub's layout, and back."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from actors.checkpoint.stored_names import SINGLE_FILE
from benchmarks.demo_model.model import Weights


def write_weights(directory: Path, weights: Weights) -> int:
    """Writes model.safetensors in bfloat16. Returns its size in bytes."""
    stored = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()}
    file = directory / SINGLE_FILE
    save_file(stored, file, metadata={"format": "pt"})
    return file.stat().st_size


def read_weights(directory: Path) -> Weights:
    """The weights of a directory that `write_weights` wrote, in float32."""
    return {name: weight.float() for name, weight in load_file(directory / SINGLE_FILE).items()}
