"""Which tokens the penalised requests have seen, on the device.

Owns one row of prompt marks and output counts per request that uses a penalty, and how they change logits. Counts are
updated from sampled ids on the device, so a step can be sampled before the host saw the step before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.attention.upload import upload


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """Penalties of P rows of a batch. `row_P` indexes the rows to change, `slot_P` the pool; int64, both distinct."""

    row_P: Tensor
    slot_P: Tensor
    repetition_P: Tensor  # fp32, as the two below
    presence_P: Tensor
    frequency_P: Tensor


class PenaltyPool:
    """Token marks and counts, [slots, V], grown by doubling: 5 bytes per slot and token of the vocabulary."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._in_prompt_SV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._num_outputs_SV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free: list[int] = []

    def allocate(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> int:
        """A slot that has seen these tokens."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        device = self._in_prompt_SV.device
        self._in_prompt_SV[slot].zero_()
        self._num_outputs_SV[slot].zero_()
        if prompt_ids:
            self._in_prompt_SV[slot].index_fill_(0, upload(prompt_ids, torch.int64, device), True)
        if output_ids:
            ids = upload(output_ids, torch.int64, device)
            self._num_outputs_SV[slot].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        return slot

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def apply_(self, x_RV: Tensor, penalties: Penalties) -> None:
        """Changes the logits (fp32) of the penalised rows in place.

        Repetition divides positive and multiplies negative logits of tokens in prompt or output; frequency is
        subtracted once per occurrence in the output, presence once if there is any.
        Source: Keskar et al., "CTRL", 2019, section 4.1, for repetition; OpenAI's API reference for the others.
        """
        num_outputs_PV = self._num_outputs_SV[penalties.slot_P]
        in_output_PV = num_outputs_PV > 0
        x_PV = x_RV[penalties.row_P]
        factor_P1 = penalties.repetition_P[:, None]
        repeated_PV = torch.where(x_PV > 0, x_PV / factor_P1, x_PV * factor_P1)
        x_PV = torch.where(self._in_prompt_SV[penalties.slot_P] | in_output_PV, repeated_PV, x_PV)
        x_PV -= num_outputs_PV * penalties.frequency_P[:, None]
        x_PV -= in_output_PV * penalties.presence_P[:, None]
        x_RV[penalties.row_P] = x_PV

    def count(self, slot_P: Tensor, token_ids_P: Tensor) -> None:
        """Notes one more output token of each slot."""
        self._num_outputs_SV[slot_P, token_ids_P] += 1

    def _grow(self) -> None:
        num_slots, vocab_size = self._in_prompt_SV.shape
        more = max(4, num_slots)
        self._in_prompt_SV = torch.cat((self._in_prompt_SV, self._in_prompt_SV.new_zeros(more, vocab_size)))
        self._num_outputs_SV = torch.cat((self._num_outputs_SV, self._num_outputs_SV.new_zeros(more, vocab_size)))
        self._free.extend(reversed(range(num_slots, num_slots + more)))
