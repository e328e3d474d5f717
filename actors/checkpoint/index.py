"""A checkpoint directory: which shards it has, which tensors they hold, and whether that is the model of its config.

Owns every refusal that can be made from headers alone, so that a broken checkpoint is known before any rank serves.
Knows nothing of devices and never reads weights. Only safetensors: no pickle is ever opened.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.checkpoint.config import ModelConfig, read_model_config
from actors.checkpoint.expected import (
    FORM_OF_LAYOUT,
    UNUSED_PREFIXES,
    ExpertLayout,
    detect_layout,
    expected_tensors,
)
from actors.checkpoint.headers import TensorInfo, read_header
from actors.checkpoint.stored_names import INDEX_FILE, SINGLE_FILE, read_weight_map
from actors.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".pth", ".pt")
_PREFIX = "language_model."


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """Where every tensor of a validated checkpoint lies, by text-only name. Vision tensors are not in it."""

    directory: Path
    tensors: Mapping[str, TensorInfo]
    layout: ExpertLayout

    def tensor(self, name: str) -> TensorInfo:
        """Raises CheckpointError if there is no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(str(self.directory), name, "is missing from the checkpoint") from None


def validate_checkpoint(directory: Path) -> CheckpointIndex:
    """Reads config.json, the index and every shard's header, and checks them against each other.

    Raises CheckpointError naming the file and, where there is one, the tensor. Costs no weight reads.
    """
    _refuse_without_safetensors(directory)
    config = read_model_config(directory)
    tensors = _read_tensors(directory)
    layout = detect_layout(tensors, config)
    index = CheckpointIndex(directory=directory, tensors=tensors, layout=layout)
    _check_quantization(index, config)
    _check_tensors(index, config)
    return index


def _refuse_without_safetensors(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(str(directory), None, "is not a directory")
    if (directory / SINGLE_FILE).exists() or (directory / INDEX_FILE).exists():
        return
    pickles = sorted(path for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(str(pickles[0]), None, "only safetensors is read, never pickle; convert the checkpoint")
    raise CheckpointError(str(directory / INDEX_FILE), None, f"does not exist, nor does {SINGLE_FILE}")


def _check_quantization(index: CheckpointIndex, config: ModelConfig) -> None:
    file, form = str(index.directory / "config.json"), FORM_OF_LAYOUT[index.layout]
    if index.layout == "none" or form == config.quantized:
        return
    if config.quantized == "plain":
        scale = next(name for name in index.tensors if name.endswith("_scale"))
        raise CheckpointError(file, scale, "the experts have scales, but there is no quantization_config")
    stored = "have no weight_scale" if form == "plain" else f"are stored as {form}"
    problem = f"quantization_config announces {config.quantized}, but the experts ({index.layout}) {stored}"
    raise CheckpointError(file, None, problem)


def _check_tensors(index: CheckpointIndex, config: ModelConfig) -> None:
    rules = expected_tensors(config, index.layout)
    for name, rule in rules.items():
        if name not in index.tensors:
            if rule.optional:
                continue
            raise CheckpointError(str(index.directory), name, "is missing from the checkpoint")
        info = index.tensors[name]
        if info.shape != rule.shape:
            problem = f"has shape {list(info.shape)}, the config asks for {list(rule.shape)}"
            raise CheckpointError(str(info.file), name, problem)
        if info.dtype not in rule.dtypes:
            raise CheckpointError(
                str(info.file), name, f"has dtype {info.dtype}, which may be {', '.join(rule.dtypes)}"
            )
    for name, info in index.tensors.items():
        if name not in rules:
            raise CheckpointError(str(info.file), name, _why_extra(name))


def _why_extra(name: str) -> str:
    """Why a tensor that no rule names cannot be there; unsupported quantizations are known by what they add."""
    kind = name.rpartition(".")[2]
    known = {
        "weight_zero_point": "is of an asymmetric quantization, which is not supported",
        "weight_g_idx": "is of a quantization that reorders columns (actorder group), which is not supported",
        "input_scale": "is of a quantization with static activation scales, which is not supported",
    }
    return known.get(kind, "is not a tensor of this model")


def _read_tensors(directory: Path) -> dict[str, TensorInfo]:
    """All text tensors under text-only names, from the single file or the shards of the index."""
    if (directory / SINGLE_FILE).exists():
        return _normalised(read_header(directory / SINGLE_FILE).values())
    return _normalised(_read_shards(directory))


def _read_shards(directory: Path) -> Iterable[TensorInfo]:
    """Every tensor that the index names, from the shard that it names; the two must agree."""
    weight_map = read_weight_map(directory / INDEX_FILE)
    headers: dict[str, dict[str, TensorInfo]] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if Path(shard).name != shard:
            raise CheckpointError(str(directory / INDEX_FILE), None, f"shard {shard!r} is not a file name")
        if not (directory / shard).is_file():
            raise CheckpointError(str(directory / shard), None, f"does not exist, but {INDEX_FILE} names it")
        headers[shard] = read_header(directory / shard)
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(str(directory / shard), name, f"is not in this shard, but {INDEX_FILE} says so")
        yield headers[shard][name]
    for shard, tensors in headers.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                raise CheckpointError(str(directory / shard), name, f"is in this shard, but not by {INDEX_FILE}")


def _normalised(infos: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        name = info.name.removeprefix(_PREFIX)
        if name.startswith(UNUSED_PREFIXES):
            continue
        if name in tensors:
            problem = f"is there twice, also as {tensors[name].name} in {tensors[name].file.name}"
            raise CheckpointError(str(info.file), info.name, problem)
        tensors[name] = info
    return tensors
