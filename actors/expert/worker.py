"""An expert rank's work: the routed experts of its slots, and their change beside serving.

Owns the slots' weights, by layer. Implements ExpertCompute, through which dispatch reaches it. Knows nothing of
requests, positions or epochs: it is told which slots serve, and leaves those alone.

One thread computes (`__call__`); another may load (`change`, `proofs`), and a third give experts away (`find`).
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.shard import WHOLE, Shard, check_expert_shard
from actors.checkpoint.tensors import Room, allocate_slots, num_weight_bytes
from actors.config import PipelineConfig
from actors.errors import CheckpointError, LayoutError
from actors.expert.origin import Origin, make_origin
from actors.expert.slots import Held, LayerSlots
from actors.expert.weight_client import Copy, Want, WeightClient, choose_sources
from actors.precision import compute_dtype
from actors.types import EMPTY_SLOT, SlotProof, SlotSource
from actors.wire import ChannelKeys

log = logging.getLogger("corral.expert")

Slots = Mapping[int, tuple[int, ...]]
"""Layer -> expert of each slot, EMPTY_SLOT where there is none."""

Report = Callable[[int, int], None]  # (bytes done, bytes in all)

# Read, then proven, before the next. On a CPU it bounds what is staged to be widened; on a GPU nothing is.
READ_BATCH_BYTES = {"cpu": 512 << 20, "cuda": 8 << 30}
# Kernels are chosen by the number of rows, as a power of two up to that of a small placement, or per slot.
REHEARSED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
REHEARSED_ROWS_PER_SLOT = (8, 20, 40, 56, 64, 128, 256)
SMALL_ROWS = 512
PROBE_SEED = 20250405
NO_PROOF = SlotProof(checksum=0, probe=0.0)


class ExpertWorker:
    """The experts of one rank. Calling it computes rows of one layer (see ExpertCompute)."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        origin: Origin,
        keys: ChannelKeys | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        """Holds nothing yet. `keys` are those of the pipeline's channels, to copy from peers. `shard`: the slice of
        every expert that `origin` gives; what is computed is then a term of a sum over the slices.

        Raises ConfigError for a slice that cannot be.
        """
        check_expert_shard(config, shard.of)
        self.device = device
        self._room = Room.on(device, config.quantized, dtype)
        form = "packed int4" if self._room.is_packed else str(dtype)
        self.weights_name = f"{origin.name} as {form}"
        self._config = config
        self._width = config.expert_width // shard.of
        self._dtype = dtype
        self._origin = origin
        self._keys = keys
        self._layers: dict[int, LayerSlots] = {}
        self._replaced: list[LayerSlots] = []
        self._changing = threading.Lock()
        self._num_rows = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        generator = torch.Generator().manual_seed(PROBE_SEED)
        with self._on_stream():
            self._probe_1D = torch.randn(1, config.hidden_size, generator=generator).to(dtype).to(device)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        pipeline: PipelineConfig,
        slots: Slots,
        device: torch.device,
        report: Report | None = None,
        sources: Sequence[SlotSource] = (),
        keys: ChannelKeys | None = None,
        shard: Shard = WHOLE,
    ) -> "ExpertWorker":
        """Copies from `sources`, reads, or with `load: dummy` makes, the experts of `slots`, or `shard` of each.

        Raises CheckpointError; ConfigError for a slice that cannot be; ValueError for slots that the model does not
        have; LayoutError if they do not fit.
        """
        origin = make_origin(config, pipeline, shard)
        worker = cls(config, compute_dtype(config, pipeline), device, origin, keys, shard)
        worker.change(slots, {}, sources, report)
        if device.type == "cuda":  # what making and proving took, on a stream whose memory nobody else can use
            torch.cuda.empty_cache()
        return worker

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are held, room of empty slots included."""
        return num_weight_bytes({layer: slots.weights for layer, slots in list(self._layers.items())})

    @torch.inference_mode()
    def __call__(self, layer: int, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        """Row n through the expert in slot `slots_N[n]` of `layer`; rows with slot -1 come back as zeros."""
        self._num_rows += int(np.count_nonzero(slots_N.numpy() >= 0)) if slots_N.is_cpu else slots_N.shape[0]
        return self._layers[layer].experts(x_ND, slots_N)

    def take_num_rows(self) -> int:
        """Rows computed since the last call; on a GPU those that are padding too, which the host cannot see."""
        num_rows, self._num_rows = self._num_rows, 0
        return num_rows

    @torch.inference_mode()
    def routed(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, slot_of_E: Tensor) -> Tensor:
        """Tokens through those of their experts that lie in a slot here, summed (see ExpertCompute)."""
        return self._layers[layer].experts.routed(x_TD, expert_ids_TK, scores_TK, slot_of_E)

    @property
    def slots(self) -> dict[int, tuple[int, ...]]:
        """What lies in every slot now, in use or not."""
        return {
            layer: tuple(slots.expert_in(slot) for slot in range(slots.capacity))
            for layer, slots in list(self._layers.items())
        }

    def holds(self, slots: Slots) -> bool:
        """Whether every expert that `slots` names lies in its slot, and there is room for those that it does not."""
        return all(
            layer in self._layers and len(experts) <= self._layers[layer].capacity for layer, experts in slots.items()
        ) and not any(True for _ in self._missing(slots))

    def find(self, layer: int, expert: int) -> tuple[LayerSlots, int, Held] | None:
        """Where an expert is held, in use or not. The slot may be written again at any time: see LayerSlots.held."""
        layer_slots = self._layers.get(layer)
        found = layer_slots.find(expert) if layer_slots else None
        return (layer_slots, *found) if layer_slots and found else None

    def proofs(self, slots: Slots) -> dict[int, tuple[SlotProof, ...]]:
        """Of every slot, made when it was loaded; zeros for empty ones. Raises ValueError for what is not held."""
        return {layer: tuple(self._proof(layer, *at) for at in enumerate(experts)) for layer, experts in slots.items()}

    def _proof(self, layer: int, slot: int, expert: int) -> SlotProof:
        if expert == EMPTY_SLOT:
            return NO_PROOF
        held = self._layers[layer].held(slot) if layer in self._layers else None
        if held is None or held.expert != expert:
            raise ValueError(f"slot {slot} of layer {layer} does not hold expert {expert}")
        return held.proof

    # --- change, beside serving ---------------------------------------------------------------------------------------

    def change(
        self, slots: Slots, in_use: Slots, sources: Sequence[SlotSource] = (), report: Report | None = None
    ) -> None:
        """Loads what `slots` names and is not there yet: from another slot, from peers, or from the checkpoint.

        Slots that `in_use` gives an expert are never written; `slots` may name the same expert there, or none. A layer
        that needs more slots than it has moves to new memory (see `free_replaced`). Raises ValueError if a slot in use
        would change, CheckpointError, LayoutError; what serves is not affected then, what came is kept, and the same
        may be asked for again.
        """
        with self._changing, self._on_stream():
            self._check(slots, in_use)
            self._make_room(slots)
            wants = [w for w in self._missing(slots) if not self._copy_here(w)]
            progress = _Progress(report, sum(self._num_bytes(want) for want in wants))
            for want in wants:
                self._layers[want.layer].drop(want.slot)
            self._read(self._fetch(wants, sources, progress), progress)

    @property
    def has_moved(self) -> bool:
        """Whether a layer has left memory that `free_replaced` will free: graphs that read it must not run then."""
        return bool(self._replaced)

    @torch.inference_mode()
    def rehearse(self, max_rows: int, has_tokens: bool = False) -> None:
        """Computes rows of nobody in every number that kernels are chosen by, up to `max_rows`, as peers send them.

        A process that `has_tokens` rehearses the small steps of these by itself: of them the others, as they come.
        """
        layer = next(iter(self._layers), None)
        if layer is None or self.device.type != "cuda":
            return
        num_slots, top_k = self._layers[layer].capacity, self._config.experts_per_token
        for num_rows in rehearsed_rows(max_rows, num_slots):
            x_ND = torch.zeros(num_rows, self._config.hidden_size, dtype=self._dtype, device=self.device)
            slots_N = torch.arange(num_rows, device=self.device) % num_slots
            if not has_tokens:
                self(layer, x_ND, slots_N)
            elif num_rows > SMALL_ROWS:
                num_tokens = -(-num_rows // top_k)
                ids_TK = slots_N[:num_tokens, None].expand(num_tokens, top_k)
                scores_TK = x_ND[:num_tokens, :top_k].contiguous()
                self.routed(layer, x_ND[:num_tokens], ids_TK, scores_TK, torch.arange(num_slots, device=self.device))
        torch.cuda.synchronize(self.device)
        self.take_num_rows()  # they were nobody's

    def free_replaced(self) -> None:
        """Frees the memory that layers left when they moved. Call it between steps; what captured the old addresses
        (a CUDA graph) must not run again. On a CPU there is nothing to do.
        """
        if self._replaced and self._stream is not None:
            torch.cuda.synchronize(self.device)
            self._replaced.clear()

    def _check(self, slots: Slots, in_use: Slots) -> None:
        config = self._config
        for layer, experts in slots.items():
            if not config.is_moe(layer) or any(not EMPTY_SLOT <= expert < config.num_experts for expert in experts):
                raise ValueError(f"layer {layer} has no experts {experts}")
        for layer, experts in in_use.items():
            for slot, (old, new) in enumerate(zip(experts, slots.get(layer, ()), strict=False)):
                if old != EMPTY_SLOT and new not in (EMPTY_SLOT, old):
                    raise ValueError(f"slot {slot} of layer {layer} serves expert {old}: it cannot become {new}")
                if old != EMPTY_SLOT and (layer not in self._layers or self._layers[layer].expert_in(slot) != old):
                    raise ValueError(f"slot {slot} of layer {layer} does not hold expert {old}, and yet it serves")

    def _make_room(self, slots: Slots) -> None:
        for layer, experts in slots.items():
            old = self._layers.get(layer)
            if old is not None and len(experts) <= old.capacity:
                continue
            new = self._allocate(layer, len(experts))
            if old is not None:
                old.copy_to(new)
                self._synchronize()
                if self._stream is not None:  # kernels of steps read it, and their graphs may do so again
                    self._replaced.append(old)
            self._layers[layer] = new

    def _allocate(self, layer: int, num_slots: int) -> LayerSlots:
        config = self._config
        try:
            weights = allocate_slots(config.hidden_size, self._width, num_slots, self._room)
            return LayerSlots(weights, self._dtype, config.quantized)
        except torch.OutOfMemoryError as e:
            raise LayoutError(f"no memory for {num_slots} experts of layer {layer}: {e}") from e

    def _missing(self, slots: Slots) -> Iterator[Want]:
        for layer, experts in slots.items():
            for slot, expert in enumerate(experts):
                if expert not in (EMPTY_SLOT, self._layers[layer].expert_in(slot)):
                    yield Want(layer, slot, expert)

    def _copy_here(self, want: Want) -> bool:
        """Copies the expert from another slot of this rank; False if there is none."""
        found = self.find(want.layer, want.expert)
        if found is None:
            return False
        layer_slots, source, held = found
        layer_slots.drop(want.slot)
        layer_slots.copy_slot(source, want.slot)
        return self._accept(want, held.proof.checksum)

    def _fetch(self, wants: Sequence[Want], sources: Sequence[SlotSource], progress: "_Progress") -> list[Want]:
        """Takes from peers what they have. Returns the rest."""
        chosen = choose_sources(wants, sources)
        if not chosen:
            return list(wants)
        copies = {
            endpoint: [Copy(want, self._layers[want.layer].parts(want.slot)) for want in some]
            for endpoint, some in chosen.items()
        }
        failed = set(WeightClient(self.weights_name, self._accept, progress.add, self._keys).fetch(copies))
        taken = {want for some in chosen.values() for want in some} - failed
        progress.done_bytes = sum(self._num_bytes(want) for want in taken)  # less what came for nothing
        log.info("copied %d of %d missing experts from peers", len(taken), len(wants))
        return [want for want in wants if want not in taken]

    def _accept(self, want: Want, checksum: int) -> bool:
        """Proves an expert that was copied into its slot, and holds it if it is what it should be."""
        proof = self._layers[want.layer].prove(want.slot, self._probe_1D)
        if proof.checksum != checksum or not math.isfinite(proof.probe):
            return False
        self._layers[want.layer].hold(want.slot, want.expert, proof)
        return True

    def _read(self, wants: Sequence[Want], progress: "_Progress") -> None:
        """Fills the slots from the origin, batch by batch. Raises CheckpointError."""
        per_batch = max(1, READ_BATCH_BYTES[self.device.type] // self._num_bytes(wants[0])) if wants else 1
        for first in range(0, len(wants), per_batch):
            batch = wants[first : first + per_batch]
            staged = [self._layers[want.layer].staging(want.slot) for want in batch]
            targets = [(want.layer, want.expert, target) for want, target in zip(batch, staged, strict=True)]
            self._origin.fill(targets, progress.part(len(batch) * self._num_bytes(batch[0])))
            for want, target in zip(batch, staged, strict=True):
                self._layers[want.layer].take_in(want.slot, target)
                self._prove(want)

    def _prove(self, want: Want) -> None:
        layer_slots = self._layers[want.layer]
        proof = layer_slots.prove(want.slot, self._probe_1D)
        if not math.isfinite(proof.probe):
            problem = f"expert {want.expert} of layer {want.layer} does not compute finite numbers"
            raise CheckpointError(self._origin.name, None, problem)
        layer_slots.hold(want.slot, want.expert, proof)

    def _num_bytes(self, want: Want) -> int:
        return sum(part.num_bytes for part in self._layers[want.layer].parts(want.slot))

    def _on_stream(self) -> AbstractContextManager[object]:
        """Loading does not queue behind steps, nor steps behind it."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def rehearsed_rows(max_rows: int, num_slots: int) -> list[int]:
    """The numbers of rows, ascending, `max_rows` last."""
    by_slot = [rows * num_slots for rows in REHEARSED_ROWS_PER_SLOT]
    return sorted({min(num_rows, max_rows) for num_rows in (*REHEARSED_ROWS, *by_slot, max_rows)})


class _Progress:
    """Counts stored bytes for those who wait."""

    def __init__(self, report: Report | None, total_bytes: int) -> None:
        self.done_bytes = 0
        self._report = report
        self._total_bytes = total_bytes

    def add(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        if self._report is not None:
            self._report(self.done_bytes, self._total_bytes)

    def part(self, num_bytes: int) -> Report:
        """The progress of the next `num_bytes`, which whoever makes them may count in bytes of its own."""
        begin_bytes = self.done_bytes

        def report(done: int, total: int) -> None:
            self.add(begin_bytes + num_bytes * done // max(1, total) - self.done_bytes)

        return report
