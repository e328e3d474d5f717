"""How the final tensors come to be: read from a checkpoint, or made at random.

Owns which stored tensors make which final one, so that a rank reads only what it holds. Knows nothing of how they are
multiplied, nor of which tensors there are (`tensors.py`, whose names are offered here too).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.dense_parts import DensePart, dense_parts, expert_parts
from actors.checkpoint.expected import FORM_OF_LAYOUT, ffn_form
from actors.checkpoint.index import CheckpointIndex
from actors.checkpoint.layouts import fused, per_expert
from actors.checkpoint.layouts.rules import ExpertTarget
from actors.checkpoint.quantization import ExpertFormat
from actors.checkpoint.reader import Progress, Reader
from actors.checkpoint.shard import WHOLE, Shard, check_expert_shard, check_shard
from actors.checkpoint.tensors import (
    AttentionWeights,
    DenseFfn,
    ExpertWeights,
    LayerWeights,
    MoeGate,
    Room,
    allocate_attention,
    allocate_slots,
    num_weight_bytes,
)
from actors.config import QuantizeFfn

__all__ = [
    "AttentionWeights", "DenseFfn", "ExpertTarget", "ExpertWeights", "LayerWeights", "MoeGate", "Room", "Shard",
    "allocate_slots", "dummy_attention", "dummy_experts", "load_attention", "load_experts", "make_expert",
    "num_weight_bytes", "read_experts",
]  # fmt: skip

Slots = Mapping[int, tuple[int, ...]]  # layer -> expert of each slot, as RankSpec.slots


def load_attention(
    index: CheckpointIndex,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Progress | None = None,
    *,
    shard: Shard = WHOLE,
    quantize_ffn: QuantizeFfn = "",
) -> AttentionWeights:
    """Reads one shard of everything but the routed experts; what is not quantized is converted to `dtype`.

    `quantize_ffn` "fp8" makes plain shared experts and dense layers FP8, one linear at a time, on the device; quantized
    ones stay as they are. Raises CheckpointError, and ConfigError for a shard that the model cannot be divided into.
    """
    weights, parts = _attention_room(config, dtype, torch.device(device), shard, quantize_ffn)
    count = _Count(progress, sum(_num_read_bytes(part, index) for part in parts))
    straight = [part for part in parts if not part.is_converted]
    Reader().read([piece for part in straight for piece in part.pieces(index.tensors, part.target)], count.part())
    for part in parts:
        if part.is_converted:
            staged = part.staging(index.tensors, weights.embed_VD.device)
            Reader().read(part.pieces(index.tensors, staged), count.part())
            part.convert(staged)
    _give_back(weights.embed_VD.device)
    return weights


def _num_read_bytes(part: DensePart, index: CheckpointIndex) -> int:
    staged = part.staging(index.tensors, torch.device("meta"))
    return sum(piece.num_bytes for piece in part.pieces(index.tensors, staged))


def dummy_attention(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    *,
    shard: Shard = WHOLE,
    quantize_ffn: QuantizeFfn = "",
) -> AttentionWeights:
    """Random weights made on the device, no file read; the same for the same seed and kind of device.

    Shards of one seed are parts of the same model. Raises ConfigError for a shard that cannot be.
    """
    weights, parts = _attention_room(config, dtype, torch.device(device), shard, quantize_ffn)
    for part in parts:
        part.make(config, seed)
    _give_back(weights.embed_VD.device)
    return weights


def _give_back(device: torch.device) -> None:
    """What converting and making took is the device's again: the KV cache takes what is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _attention_room(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, shard: Shard, quantize_ffn: QuantizeFfn
) -> tuple[AttentionWeights, list[DensePart]]:
    check_shard(config, shard.of)
    stored = ffn_form(config)
    held: ExpertFormat = "fp8" if stored == "plain" and quantize_ffn == "fp8" else stored
    weights = allocate_attention(config, Room.on(device, held, dtype), shard)
    return weights, list(dense_parts(weights, config))


def load_experts(
    index: CheckpointIndex,
    config: ModelConfig,
    slots: Slots,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Progress | None = None,
    shard: Shard = WHOLE,
) -> dict[int, ExpertWeights]:
    """Reads the experts of `slots`, or one slice of each, and nothing else; by layer. Quantized ones stay as they are
    stored on any device.

    Raises CheckpointError, ConfigError for a slice that cannot be, and ValueError for a slot that the model does not
    have.
    """
    weights = _experts_room(config, slots, dtype, torch.device(device), FORM_OF_LAYOUT[index.layout], shard)
    read_experts(index, _targets(weights, slots), progress, shard)
    return weights


def read_experts(
    index: CheckpointIndex,
    wanted: Iterable[tuple[int, int, ExpertTarget]],
    progress: Progress | None = None,
    shard: Shard = WHOLE,
) -> None:
    """Reads `shard` of experts, each a (layer, expert, where to), and nothing else. Raises CheckpointError.

    On CUDA the reads are queued on the calling thread's current stream, and may not have ended when it returns.
    """
    form, is_fused = FORM_OF_LAYOUT[index.layout], index.layout.startswith("fused")
    pieces = [
        piece
        for layer, expert, target in wanted
        for piece in (
            fused.expert_pieces(index.tensors, layer, expert, target, shard)
            if is_fused
            else per_expert.expert_pieces(index.tensors, form, layer, expert, target, shard)
        )
    ]
    Reader().read(pieces, progress)


def dummy_experts(
    config: ModelConfig,
    slots: Slots,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    form: ExpertFormat,
    shard: Shard = WHOLE,
) -> dict[int, ExpertWeights]:
    """Random experts made on the device. Each depends on (seed, layer, expert) only: any split is the same model."""
    weights = _experts_room(config, slots, dtype, torch.device(device), form, shard)
    for layer, expert, target in _targets(weights, slots):
        make_expert(config, layer, expert, target, seed, shard)
    return weights


def make_expert(
    config: ModelConfig, layer: int, expert: int, target: ExpertTarget, seed: int, shard: Shard = WHOLE
) -> None:
    """Fills `target`, on its device and in its form, with `shard` of the random expert of (seed, layer, expert)."""
    for part in expert_parts(config, layer, expert, target, shard):
        part.make(config, seed)


def _experts_room(
    config: ModelConfig, slots: Slots, dtype: torch.dtype, device: torch.device, form: ExpertFormat, shard: Shard
) -> dict[int, ExpertWeights]:
    check_expert_shard(config, shard.of)
    for layer, experts in slots.items():
        if not config.is_moe(layer) or any(not 0 <= expert < config.num_experts for expert in experts):
            raise ValueError(f"layer {layer} has no experts {experts}")
    room = Room(form=form, dtype=dtype, device=device, widens=False)
    hidden, width = config.hidden_size, config.expert_width // shard.of
    return {layer: allocate_slots(hidden, width, len(experts), room) for layer, experts in slots.items()}


def _targets(weights: Mapping[int, ExpertWeights], slots: Slots) -> Iterator[tuple[int, int, ExpertTarget]]:
    for layer, experts in slots.items():
        for slot, expert in enumerate(experts):
            yield layer, expert, weights[layer].slot(slot)


class _Count:
    """One progress for several reads."""

    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = 0

    def part(self) -> Callable[[int, int], None]:
        """The progress of the next read."""
        begin_bytes = self._done_bytes

        def report(done: int, total: int) -> None:
            self._done_bytes = begin_bytes + done
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)

        return report
