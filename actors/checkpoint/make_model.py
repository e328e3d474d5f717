"""Writes checkpoints in the hub's layout with random weights: for tests, demonstrations and benchmarks.

Owns the files of such a directory; `shape_models.py` decides where it lies. Weights stream to disk one matrix at a
time, so that a slice of a full-size model needs little memory. Knows nothing of reading them back.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.expected import ExpertLayout, expected_tensors
from actors.checkpoint.index import INDEX_FILE, SINGLE_FILE
from actors.checkpoint.random_weights import quantize_fp8, random_down, random_gate_up, random_lm_head, random_tensor
from actors.checkpoint.reader import TORCH_DTYPES, Progress
from actors.checkpoint.shapes import (
    LAYOUTS,
    ConfigStyle,
    ModelShape,
    StoredExperts,
    config_json,
    generation_config_json,
    shape_config,
)
from actors.checkpoint.tokenizer_files import write_tokenizer

SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A tensor to be written. `make` yields its values in order, in parts of one matrix each."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def make_model(
    directory: Path,
    shape: ModelShape,
    *,
    experts: StoredExperts = "fused",
    dtype: str = "auto",
    prefix: bool = False,
    config_style: ConfigStyle = "new",
    seed: int = 0,
    shards: int = 2,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint of `shape` into `directory` (made if need be, files of the same names replaced).

    dtype: "float32", "bfloat16", "float16", or "auto" for the shape's. prefix: names and config of the multimodal
    form (`language_model.…`, `text_config`). shards: 1 writes a single model.safetensors without an index.
    progress(done_bytes, total_bytes). Raises ValueError for sizes that make no model, OSError from the disk.
    """
    write_description(directory, shape, experts=experts, dtype=dtype, prefix=prefix, config_style=config_style)
    config = shape_config(shape, experts=experts, dtype=dtype)
    planned = _plan(config, LAYOUTS[experts], seed)
    groups = _split(planned, shards)
    file_prefix = "language_model." if prefix else ""
    total_bytes, done_bytes = sum(tensor.num_bytes for tensor in planned), 0
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= {file_prefix + tensor.name: name for tensor in group}
        for written_bytes in _write_shard(directory / name, group, file_prefix):
            done_bytes += written_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(directory / INDEX_FILE, index)


def write_description(
    directory: Path,
    shape: ModelShape,
    *,
    experts: StoredExperts = "fused",
    dtype: str = "auto",
    prefix: bool = False,
    config_style: ConfigStyle = "new",
) -> None:
    """Writes all files but the weights: enough for `load: dummy`."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(
        directory / "config.json", config_json(shape, experts=experts, dtype=dtype, style=config_style, nested=prefix)
    )
    _write_json(directory / "generation_config.json", generation_config_json(shape))
    write_tokenizer(directory, shape.base_vocab, shape.vocab_size, shape.max_position_embeddings)


def _plan(config: ModelConfig, layout: ExpertLayout, seed: int) -> list[_Planned]:
    """Every tensor of the checkpoint, in the order of the layers."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    planned = []
    for name, rule in expected_tensors(config, layout).items():
        if rule.optional:
            continue
        stored = dtype
        if name.endswith(".weight_scale"):
            stored = torch.bfloat16
        elif rule.dtypes == ("F8_E4M3",):
            stored = torch.float8_e4m3fn
        make = partial(_make_tensor, config, name, rule.shape, stored, seed)
        planned.append(_Planned(name=name, dtype=stored, shape=rule.shape, make=make))
    return sorted(planned, key=lambda tensor: _layer_of(tensor.name, config))


def _layer_of(name: str, config: ModelConfig) -> int:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer:
        return int(layer[1])
    return -1 if name.startswith("model.embed_tokens") else config.num_layers


def _make_tensor(
    config: ModelConfig, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> Iterator[Tensor]:
    """The values of one stored tensor, in parts of one matrix each."""
    fused = re.fullmatch(r"model\.layers\.(\d+)\.feed_forward\.experts\.(gate_up|down)_proj", name)
    if fused:
        for expert in range(config.num_experts):
            random_part = random_gate_up if fused[2] == "gate_up" else random_down
            yield random_part(config, int(fused[1]), expert, seed=seed, device=_CPU).t().to(dtype)
    elif name.endswith(".weight_scale"):
        weight_shape = _weight_shape(config, name)
        yield _quantized(name.removesuffix("_scale"), weight_shape, seed)[1].unsqueeze(-1).to(dtype)
    elif dtype == torch.float8_e4m3fn:
        yield _quantized(name, shape, seed)[0]
    elif name == "lm_head.weight":
        yield random_lm_head(config, seed=seed, device=_CPU).to(dtype)
    else:
        yield random_tensor(name, shape, seed=seed, device=_CPU).to(dtype)


def _weight_shape(config: ModelConfig, scale_name: str) -> tuple[int, int]:
    is_down = scale_name.endswith(".down_proj.weight_scale")
    return (config.hidden_size, config.expert_width) if is_down else (config.expert_width, config.hidden_size)


@lru_cache(maxsize=1)  # a weight's scale is written right after it
def _quantized(name: str, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    return quantize_fp8(random_tensor(name, shape, seed=seed, device=_CPU))


def _split(planned: list[_Planned], shards: int) -> list[list[_Planned]]:
    """Consecutive groups of about equal bytes; fewer than `shards` where one tensor is more than a share."""
    share_bytes = max(1.0, sum(tensor.num_bytes for tensor in planned) / max(1, shards))
    groups: dict[int, list[_Planned]] = {}
    begun_bytes = 0
    for tensor in planned:
        groups.setdefault(min(int(begun_bytes / share_bytes), shards - 1), []).append(tensor)
        begun_bytes += tensor.num_bytes
    return list(groups.values())


def _write_shard(file: Path, group: list[_Planned], file_prefix: str) -> Iterator[int]:
    """Writes one safetensors file front to back. Yields the bytes of each part once it is written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in group:
        header[file_prefix + tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [position, position + tensor.num_bytes],
        }
        position += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data that begins at a multiple of eight
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in group:
            for part in tensor.make():
                yield _write_values(stream, part)


def _write_values(stream: BinaryIO, values: Tensor) -> int:
    return stream.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_json(file: Path, values: Mapping[str, object]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
