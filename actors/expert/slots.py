"""The slots of one layer: stacked weights, and which slot holds which expert.

Owns what each slot holds, and says nothing of a slot while it is written. Knows nothing of where experts come from.
One thread writes; others read at the same time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.checkpoint.layouts.rules import ExpertTarget
from actors.checkpoint.quantization import ExpertFormat
from actors.checkpoint.quantized import widen_int4
from actors.checkpoint.tensors import ExpertWeights, Room, allocate_slots
from actors.expert.experts import LayerExperts
from actors.expert.stored import Part, checksum, parts_of
from actors.types import EMPTY_SLOT, SlotProof

_STORED_DTYPES = {"fp8": torch.float8_e4m3fn, "int4": torch.int32}


@dataclass(frozen=True, slots=True)
class Held:
    """A slot's expert, whole and proven. A slot that is written again has a new one, or none."""

    expert: int
    proof: SlotProof


class LayerSlots:
    """Slots of one MoE layer, some of which may be empty. `experts` computes with them."""

    def __init__(self, weights: ExpertWeights, dtype: torch.dtype, stored: ExpertFormat) -> None:
        """`weights` has room for every slot, in the form in which it is held; `dtype` is computed in; `stored` is the
        form in which an origin gives experts.
        """
        self.experts = LayerExperts(weights, dtype)
        self._stored = stored
        self._held: list[Held | None] = [None] * weights.down_SDF.shape[0]

    @property
    def weights(self) -> ExpertWeights:
        return self.experts.weights

    @property
    def capacity(self) -> int:
        return len(self._held)

    def held(self, slot: int) -> Held | None:
        """None where the slot is empty, is being written, or is beyond the last one."""
        return self._held[slot] if slot < len(self._held) else None

    def expert_in(self, slot: int) -> int:
        """EMPTY_SLOT where `held` is None."""
        held = self.held(slot)
        return EMPTY_SLOT if held is None else held.expert

    def find(self, expert: int) -> tuple[int, Held] | None:
        """The first slot that holds `expert`."""
        return next(((slot, held) for slot, held in self._all_held() if held.expert == expert), None)

    def parts(self, slot: int) -> tuple[Part, ...]:
        """The slot's tensors as stored bytes."""
        return parts_of(self.weights.slot(slot), self._stored)

    def drop(self, slot: int) -> None:
        """Nobody is told of the slot any more: it may be written."""
        self._held[slot] = None

    def hold(self, slot: int, expert: int, proof: SlotProof) -> None:
        """The slot is written, and all that wrote it has ended."""
        self._held[slot] = Held(expert, proof)

    def staging(self, slot: int) -> ExpertTarget:
        """Where to read an expert as it is stored: the slot itself, or where that is held otherwise, room beside it."""
        target = self.weights.slot(slot)
        if target.down_DF.dtype == _STORED_DTYPES.get(self._stored, target.down_DF.dtype):
            return target
        (hidden, width), device = target.down_DF.shape, target.down_DF.device
        room = Room(form=self._stored, dtype=target.down_DF.dtype, device=device, widens=False)
        return allocate_slots(hidden, width, 1, room).slot(0)

    def take_in(self, slot: int, staged: ExpertTarget) -> None:
        """Brings what was read into `staging` to its final place: FP8 widened as it is, INT4 scaled and rounded once to
        the dtype that is computed in.
        """
        target = self.weights.slot(slot)
        if staged.down_DF.dtype == target.down_DF.dtype:
            return
        for weight, scale, staged_weight, staged_scale in (
            (target.gate_up_ND, target.gate_up_scale_N, staged.gate_up_ND, staged.gate_up_scale_N),
            (target.down_DF, target.down_scale_D, staged.down_DF, staged.down_scale_D),
        ):
            assert staged_scale is not None, "what is held otherwise was quantized"
            if scale is None:
                weight.copy_(widen_int4(staged_weight, staged_scale, weight.dtype))
            else:
                weight.copy_(staged_weight)
                scale.copy_(staged_scale)

    def copy_slot(self, source: int, target: int) -> None:
        """One slot's tensors to another."""
        for stacked in _stacks(self.weights):
            stacked[target].copy_(stacked[source])

    def copy_to(self, larger: "LayerSlots") -> None:
        """Gives what is held to the first slots of another set, which may be published when the device has done it."""
        for ours, theirs in zip(_stacks(self.weights), _stacks(larger.weights), strict=True):
            for slot, _ in self._all_held():
                theirs[slot].copy_(ours[slot])
        larger._held[: self.capacity] = self._held

    @torch.inference_mode()
    def prove(self, slot: int, probe_1D: Tensor) -> SlotProof:
        """Reads the slot once for its checksum, and runs `probe_1D` through it as a step would."""
        y_1D = self.experts(probe_1D, torch.tensor([slot], device=probe_1D.device))
        return SlotProof(checksum=checksum(self.parts(slot)), probe=float(y_1D.float().abs().mean()))

    def _all_held(self) -> Iterator[tuple[int, Held]]:
        return ((slot, held) for slot, held in enumerate(self._held) if held is not None)


def _stacks(weights: ExpertWeights) -> tuple[Tensor, ...]:
    stacks = (weights.gate_up_SND, weights.down_SDF, weights.gate_up_scale_SN, weights.down_scale_SD)
    return tuple(stack for stack in stacks if stack is not None)
