"""The arithmetic of routed experts: rows in, rows out.

Owns SwiGLU over the slots of one layer, on a CPU slot by slot, on a GPU by `actors/kernels` without waiting for the
device. Knows nothing of replicas, or where rows come from.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from actors.checkpoint.weights import ExpertWeights
from actors.kernels.grouped import form_of, grouped_linear, grouped_swiglu
from actors.kernels.linear import linear
from actors.kernels.quantize import quantize_rows, swiglu
from actors.kernels.route import combine_rows, gather_rows

__all__ = ["LayerExperts", "quantize_rows"]


class LayerExperts:
    """The slots of one MoE layer on this process."""

    def __init__(self, weights: ExpertWeights, dtype: torch.dtype) -> None:
        self.weights = _for_device(weights, dtype)
        self._num_slots = weights.down_SDF.shape[0]
        self._is_on_gpu = weights.down_SDF.is_cuda

    def __call__(self, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        """Row n through the expert in `slots_N[n]`; rows with slot -1 come back as zeros. N may be 0."""
        if x_ND.shape[0] == 0:
            return x_ND.new_empty(x_ND.shape)
        if self._is_on_gpu:
            return self._run_placed(x_ND, slots_N.contiguous(), None, None)  # they may lie between rows
        if x_ND.shape[0] == 1:
            return self._run_slots(x_ND, [int(slots_N)], [1])
        slots, counts = _host_groups(slots_N)
        if len(slots) == 1:
            return self._run_slots(x_ND, slots, counts)
        order_N = slots_N.argsort(stable=True)
        y_sorted_ND = self._run_slots(x_ND.index_select(0, order_N), slots, counts)
        return torch.empty_like(y_sorted_ND).index_copy_(0, order_N, y_sorted_ND)

    def routed(self, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, slot_of_E: Tensor) -> Tensor:
        """y_t = sum over k of expert_tk(score_tk * x_t), over those experts that have a slot in `slot_of_E`.

        int64 [E], -1 for experts that are not here; an id of -1 is padding. T may be 0.
        """
        if x_TD.shape[0] == 0:
            return x_TD.new_empty(x_TD.shape)
        if self._is_on_gpu:
            return self._run_placed(x_TD, expert_ids_TK.flatten(), scores_TK.flatten(), slot_of_E)
        slots_TK = slot_of_E[expert_ids_TK].where(expert_ids_TK >= 0, -1)
        rows_ND = (x_TD[:, None] * scores_TK[..., None]).flatten(0, 1)
        return self(rows_ND, slots_TK.flatten()).view(*slots_TK.shape, -1).sum(1)

    def _run_placed(self, x_TD: Tensor, ids_N: Tensor, scores_N: Tensor | None, slot_of_E: Tensor | None) -> Tensor:
        """All slots at once; the host waits for nothing, and every launch depends on shapes alone."""
        w, num_slots = self.weights, self._num_slots
        rows = gather_rows(x_TD, ids_N, scores_N, slot_of_E, num_slots, form_of(w.down_SDF))
        hidden = grouped_swiglu(rows, w.gate_up_SND, w.gate_up_scale_SN)
        parts_PND = grouped_linear(hidden, w.down_SDF, w.down_scale_SD)
        return combine_rows(parts_PND, rows.placement, x_TD.shape[0], x_TD.dtype)

    def _run_slots(self, x_ND: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Rows sorted by slot: the first `counts[0]` rows are of `slots[0]`, and so on."""
        if len(slots) == 1 and slots[0] >= 0:
            return self._run_slot(x_ND, slots[0])
        y_ND = torch.zeros_like(x_ND) if slots[0] < 0 else torch.empty_like(x_ND)
        row = 0
        for slot, count in zip(slots, counts, strict=True):
            if slot >= 0:
                y_ND[row : row + count] = self._run_slot(x_ND[row : row + count], slot)
            row += count
        return y_ND

    def _run_slot(self, x_ND: Tensor, slot: int) -> Tensor:
        w = self.weights.slot(slot)
        return linear(swiglu(linear(x_ND, w.gate_up_ND, w.gate_up_scale_N)), w.down_DF, w.down_scale_D)


def _host_groups(slots_N: Tensor) -> tuple[list[int], list[int]]:
    """Slots that have rows, ascending, and how many rows each has. Waits for the device."""
    counts = torch.bincount(slots_N + 1).tolist()
    present = [i for i, count in enumerate(counts) if count]
    return [i - 1 for i in present], [counts[i] for i in present]


def _for_device(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """On a CPU fp8 weights are widened once, exactly; their scales stay apart."""
    if weights.down_SDF.dtype != torch.float8_e4m3fn or weights.down_SDF.device.type != "cpu":
        return weights
    return replace(weights, gate_up_SND=weights.gate_up_SND.to(dtype), down_SDF=weights.down_SDF.to(dtype))
