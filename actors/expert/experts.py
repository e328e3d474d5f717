"""The arithmetic of routed experts: rows in, rows out.

Owns SwiGLU over slots of one layer, plain or fp8. Knows nothing of scores (they have scaled the rows already),
replicas, or where rows come from. fp8 source: compressed-tensors, float-quantized with a dynamic scale per token.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.checkpoint.weights import ExpertWeights

FP8_MAX = 448.0  # float8_e4m3fn


def quantize_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [N, D] and fp32 scales [N, 1] with x ~ q * s, s = max|x| / 448 of each row; 0 rows stay 0."""
    exact_ND = x_ND.float()
    scales_N1 = exact_ND.abs().amax(dim=1, keepdim=True) / FP8_MAX
    safe_N1 = torch.where(scales_N1 > 0, scales_N1, torch.ones_like(scales_N1))
    return (exact_ND / safe_N1).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), safe_N1


class LayerExperts:
    """The slots of one MoE layer on this process."""

    def __init__(self, weights: ExpertWeights, dtype: torch.dtype) -> None:
        self.weights = _for_device(weights, dtype)
        self._dtype = dtype
        self._num_slots = weights.gate_up_SND.shape[0]
        self._is_grouped = _can_group(weights, dtype)

    def __call__(self, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        """Row n through the expert in `slots_N[n]`; rows with slot -1 come back as zeros. N may be 0."""
        if x_ND.shape[0] == 0:
            return x_ND.new_empty(x_ND.shape)
        if self._is_grouped:
            return self._run_grouped(x_ND, slots_N)
        if x_ND.shape[0] == 1:
            return self._run_slots(x_ND, [int(slots_N)], [1])
        slots, counts = _host_groups(slots_N)
        if len(slots) == 1:
            return self._run_slots(x_ND, slots, counts)
        order_N = slots_N.argsort(stable=True)
        y_sorted_ND = self._run_slots(x_ND.index_select(0, order_N), slots, counts)
        return torch.empty_like(y_sorted_ND).index_copy_(0, order_N, y_sorted_ND)

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
        gate_NF, up_NF = self._linear(x_ND, w.gate_up_ND, w.gate_up_scale_N).chunk(2, dim=1)
        return self._linear(F.silu(gate_NF).mul_(up_NF), w.down_DF, w.down_scale_D)

    def _linear(self, x_NI: Tensor, weight_OI: Tensor, scale_O: Tensor | None) -> Tensor:
        """x @ W.T. With scales: (q_x . q_w) * s_token * scale, the product in the compute dtype, scaled in fp32."""
        if scale_O is None:
            return F.linear(x_NI, weight_OI)
        quantized_NI, scales_N1 = quantize_rows(x_NI)
        product_NO = F.linear(quantized_NI.to(self._dtype), weight_OI.to(self._dtype))
        return (product_NO.float() * scales_N1 * scale_O).to(x_NI.dtype)

    def _run_grouped(self, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        """All slots in two grouped matmuls; the host waits for nothing. Padding is sorted to the end."""
        sorted_N, order_N = slots_N.where(slots_N >= 0, self._num_slots).sort(stable=True)
        slots_S = torch.arange(self._num_slots, device=slots_N.device)
        offsets_S = torch.searchsorted(sorted_N, slots_S, right=True, out_int32=True)
        w = self.weights
        gate_up_NF = F.grouped_mm(x_ND.index_select(0, order_N), w.gate_up_SND.transpose(1, 2), offs=offsets_S)
        gate_NF, up_NF = gate_up_NF.chunk(2, dim=1)
        y_sorted_ND = F.grouped_mm(F.silu(gate_NF).mul_(up_NF), w.down_SDF.transpose(1, 2), offs=offsets_S)
        y_sorted_ND.masked_fill_((sorted_N == self._num_slots)[:, None], 0)
        return torch.empty_like(y_sorted_ND).index_copy_(0, order_N, y_sorted_ND)


def _host_groups(slots_N: Tensor) -> tuple[list[int], list[int]]:
    """Slots that have rows, ascending, and how many rows each has. Waits for the device."""
    counts = torch.bincount(slots_N + 1).tolist()
    present = [i for i, count in enumerate(counts) if count]
    return [i - 1 for i in present], [counts[i] for i in present]


def _can_group(weights: ExpertWeights, dtype: torch.dtype) -> bool:
    """Grouped matmuls want a GPU, bf16 and rows of whole 16-byte blocks."""
    stored = weights.down_SDF
    on_gpu = stored.device.type == "cuda" and hasattr(F, "grouped_mm")
    return on_gpu and stored.dtype == dtype == torch.bfloat16 and all(n % 8 == 0 for n in stored.shape[1:])


def _for_device(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """On a CPU fp8 weights are widened once, exactly (their scales stay apart); a GPU widens a slot when it is used."""
    if weights.gate_up_scale_SN is None or weights.down_SDF.device.type != "cpu":
        return weights
    return replace(weights, gate_up_SND=weights.gate_up_SND.to(dtype), down_SDF=weights.down_SDF.to(dtype))
