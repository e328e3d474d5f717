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
from actors.checkpoint.layouts.rules import PLAIN_DTYPES
from actors.checkpoint.quantized import PACKED, quantize_fp8, quantize_int4
from actors.checkpoint.random_weights import random_down, random_gate_up, random_lm_head, random_tensor
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
from actors.checkpoint.stored_names import INDEX_FILE, SINGLE_FILE
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
        if name == "lm_head.weight" and rule.optional:
            continue
        stored = dtype if rule.dtypes == PLAIN_DTYPES else TORCH_DTYPES[rule.dtypes[0]]
        if name.endswith("_scale"):
            stored = torch.float32 if layout == "fused_fp8" else torch.bfloat16
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
    fused = re.fullmatch(r"model\.layers\.(\d+)\.feed_forward\.experts\.(gate_up|down)_proj(_scale)?", name)
    linear, _, kind = name.rpartition(".")
    if fused:
        for expert in range(config.num_experts):
            yield _fused_part(config, int(fused[1]), expert, fused[2], seed, dtype, is_scale=bool(fused[3]))
    elif kind == "weight_packed":
        yield _int4(linear, (shape[0], shape[1] * PACKED), seed)[0]
    elif kind == "weight_shape":
        yield torch.tensor(_weight_shape(config, linear), dtype=dtype)
    elif kind == "weight_scale":
        quantized = _int4 if config.quantized == "int4" else _fp8
        scale = quantized(linear, _weight_shape(config, linear), seed)[1]
        yield scale.reshape(shape).to(dtype)
    elif dtype == torch.float8_e4m3fn:
        yield _fp8(linear, (shape[0], shape[1]), seed)[0]
    elif name == "lm_head.weight":
        yield random_lm_head(config, seed=seed, device=_CPU).to(dtype)
    else:
        yield random_tensor(name, shape, seed=seed, device=_CPU).to(dtype)


def _fused_part(
    config: ModelConfig, layer: int, expert: int, part: str, seed: int, dtype: torch.dtype, *, is_scale: bool
) -> Tensor:
    """One expert's slice of a fused tensor, input-major, or of its scales."""
    random_part = random_gate_up if part == "gate_up" else random_down
    values_OI = random_part(config, layer, expert, seed=seed, device=_CPU)
    if is_scale:
        return quantize_fp8(values_OI)[1].to(dtype)
    return (quantize_fp8(values_OI)[0] if dtype == torch.float8_e4m3fn else values_OI).t().to(dtype)


def _weight_shape(config: ModelConfig, linear: str) -> tuple[int, int]:
    """[O, I] of a linear of an expert or an FFN by its name."""
    width = config.expert_width if "expert" in linear else config.dense_width
    return (config.hidden_size, width) if linear.endswith(".down_proj") else (width, config.hidden_size)


@lru_cache(maxsize=1)  # a weight's scale is written right after it
def _fp8(linear: str, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    return quantize_fp8(random_tensor(f"{linear}.weight", shape, seed=seed, device=_CPU))


@lru_cache(maxsize=1)
def _int4(linear: str, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    return quantize_int4(random_tensor(f"{linear}.weight", shape, seed=seed, device=_CPU))


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
