"""From a gate's logits to rows that lie in the order of their slots, and back.

Owns choice, placement and what happens to a row on its way. Knows nothing of what experts compute. Nothing here waits
for the device. Rows are tokens times K, token-major; a row is nowhere (place -1) if this process does not hold its
expert.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.kernels.quantize import quantize_rows, to_word_order
from actors.kernels.triton_here import HAS_TRITON

Form = Literal["plain", "fp8", "int4"]
"""What rows are made for: weights as they are, FP8 with a scale per row, or INT4 (columns in word order)."""

_MODES: dict[Form, int] = {"plain": 0, "fp8": 1, "int4": 2}
MAX_SMALL = 1024  # rows whose places every program finds for itself
MAX_GATE_TOKENS, MAX_GATE_LOGITS = 256, 6144  # of a gate in one kernel, which reads the router once for 16 tokens
GATE_TOKENS = 16
GATE_TURNS = 8  # launches of a gate one after another that may overlap


@dataclass(frozen=True, slots=True)
class Placement:
    """`place_N` int32: where each row lies among those sorted by slot (stable), -1 if nowhere; `counts_S` int64: rows
    of each slot; `ends_S` int32: the first place after each slot's rows.
    """

    place_N: Tensor
    counts_S: Tensor
    ends_S: Tensor


@dataclass(frozen=True, slots=True)
class PlacedRows:
    """Rows [N, D] in their places, in the form that weights want; `scale_N1` with FP8 only.

    Rows from `placement.ends_S[-1]` on are undefined. Without a placement all rows go to the one slot that there is.
    `dtype` is what results are rounded to.
    """

    x_ND: Tensor
    scale_N1: Tensor | None
    placement: Placement | None
    dtype: torch.dtype


class GateScratch:
    """Counters of the gates of one process: programs that are done, zero between launches.

    Launches take turns, so that a few of them, one after another, may overlap.
    """

    def __init__(self, device: torch.device) -> None:
        num_blocks = -(-MAX_GATE_TOKENS // GATE_TOKENS)
        self._num_done = torch.zeros(GATE_TURNS, num_blocks, dtype=torch.int32, device=device)
        self._turn = 0

    def take(self) -> Tensor:
        """A zero for every GATE_TOKENS tokens."""
        self._turn = (self._turn + 1) % GATE_TURNS
        return self._num_done[self._turn]


def choose_experts(
    x_TD: Tensor,
    router_ED: Tensor,
    top_k: int,
    lots_T: Tensor | None = None,
    is_padding_T1: Tensor | None = None,
    counts_E: Tensor | None = None,
    scratch: GateScratch | None = None,
) -> tuple[Tensor, Tensor]:
    """int64 ids [T, K] of the largest logits x @ router.T and their sigmoids in x's dtype; nothing is renormalised.

    Ids are -1 where bool `is_padding_T1` is set; others are counted in int64 `counts_E`. With `lots_T` experts are
    taken by lot (see `draw_lots`): the balanced load of a benchmark, not the model's answer. With `scratch`, bf16 on a
    GPU takes one launch.
    """
    if scratch is not None and x_TD.is_cuda and HAS_TRITON and x_TD.dtype == router_ED.dtype == torch.bfloat16:
        num_tokens, num_experts = x_TD.shape[0], router_ED.shape[0]
        if 0 < num_tokens <= MAX_GATE_TOKENS and num_tokens * num_experts <= MAX_GATE_LOGITS:
            from actors.kernels.gate_triton import launch_gate

            ids_TK, scores_TK = _empty_choice(x_TD, top_k)
            given = lots_T, is_padding_T1, ids_TK, scores_TK, counts_E
            launch_gate(x_TD.contiguous(), router_ED, scratch.take(), *given)
            return ids_TK, scores_TK
    return choose_by_logits(gate_logits(x_TD, router_ED), top_k, x_TD.dtype, lots_T, is_padding_T1, counts_E)


def gate_logits(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """fp32 [T, E]: products of the tensors' own dtype summed in fp32; with an fp32 router everything is fp32."""
    if x_TD.is_cuda and x_TD.dtype == router_ED.dtype == torch.bfloat16:
        return torch.mm(x_TD, router_ED.t(), out_dtype=torch.float32)
    return F.linear(x_TD.float(), router_ED.float())


def choose_by_logits(
    logits_TE: Tensor,
    top_k: int,
    dtype: torch.dtype,
    lots_T: Tensor | None = None,
    is_padding_T1: Tensor | None = None,
    counts_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`choose_experts` of logits that are there, with scores in `dtype`."""
    if logits_TE.is_cuda and HAS_TRITON and logits_TE.shape[0]:
        from actors.kernels.gate_triton import launch_choose

        ids_TK, scores_TK = _empty_choice(logits_TE, top_k, dtype)
        launch_choose(logits_TE.contiguous(), lots_T, is_padding_T1, ids_TK, scores_TK, counts_E)
        return ids_TK, scores_TK
    if lots_T is None:
        values_TK, ids_TK = logits_TE.topk(top_k, dim=1)
    else:
        offsets_K = torch.arange(top_k, device=lots_T.device)
        ids_TK = (lots_T[:, None] * top_k + offsets_K) % logits_TE.shape[1]
        values_TK = logits_TE.gather(1, ids_TK)
    if is_padding_T1 is not None:
        ids_TK = ids_TK.masked_fill(is_padding_T1, -1)
    if counts_E is not None:
        ids_N = ids_TK.flatten()
        counts_E.scatter_add_(0, ids_N.clamp(min=0), (ids_N >= 0).long())
    return ids_TK, values_TK.sigmoid().to(dtype)


def draw_lots(positions_T: Tensor, num_layers: int) -> Tensor:
    """int64 [num_layers, T]: a number for each row and layer that stands for an expert, as if at random.

    From positions (int64) and rows alone, so that all ranks draw the same; neighbours in any of the three come apart.
    """
    if positions_T.is_cuda and HAS_TRITON and len(positions_T):
        from actors.kernels.gate_triton import launch_lots

        launch_lots(positions_T, lots_MT := positions_T.new_empty(num_layers, len(positions_T)))
        return lots_MT
    device = positions_T.device
    rows_T, layers_M = (torch.arange(n, device=device) for n in (len(positions_T), num_layers))
    lots_MT = positions_T * 2654435761 + rows_T * 40503 + layers_M[:, None] * 2246822519
    for shift in (15, 13):  # multiply and fold
        lots_MT = (lots_MT ^ (lots_MT >> shift)).mul_(0x2C1B3C6D).bitwise_and_(0x7FFFFFFF)
    return lots_MT


def _empty_choice(like_TX: Tensor, top_k: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    T = like_TX.shape[0]
    return like_TX.new_empty(T, top_k, dtype=torch.int64), like_TX.new_empty(T, top_k, dtype=dtype)


def place(ids_N: Tensor, slot_of_E: Tensor | None, num_slots: int) -> Placement:
    """Places of rows by their experts' slots in `slot_of_E` (-1: not here); `ids_N` are slots where that is None.

    An id of -1 (padding) is nowhere. `ids_N` and `slot_of_E` are int64.
    """
    placement = _empty_placement(ids_N, num_slots)
    if ids_N.is_cuda and HAS_TRITON and ids_N.shape[0]:
        from actors.kernels.route_triton import launch_place

        launch_place(ids_N, slot_of_E, placement.place_N, placement.counts_S, placement.ends_S)
        return placement
    slots_N = ids_N if slot_of_E is None else slot_of_E[ids_N].where(ids_N >= 0, -1)
    sorted_N, order_N = slots_N.where(slots_N >= 0, num_slots).sort(stable=True)
    slots_S = torch.arange(num_slots, device=ids_N.device)
    placement.ends_S.copy_(torch.searchsorted(sorted_N, slots_S, right=True))
    placement.counts_S.copy_(placement.ends_S.diff(prepend=placement.ends_S.new_zeros(1)))
    placement.place_N[order_N] = torch.arange(ids_N.shape[0], dtype=torch.int32, device=ids_N.device)
    placement.place_N.masked_fill_(slots_N < 0, -1)
    return placement


def gather_rows(
    x_TD: Tensor, ids_N: Tensor, scores_N: Tensor | None, slot_of_E: Tensor | None, num_slots: int, form: Form
) -> PlacedRows:
    """Row n, x[n // K] times its score in x's dtype, to its place, in the form that the experts' weights want.

    Up to MAX_SMALL rows are placed and gathered by one kernel.
    """
    if not (x_TD.is_cuda and HAS_TRITON and ids_N.shape[0]):
        return _gather_in_torch(x_TD, ids_N, scores_N, place(ids_N, slot_of_E, num_slots), form)
    from actors.kernels.route_triton import launch_gather

    is_placed = ids_N.shape[0] > MAX_SMALL
    placement = place(ids_N, slot_of_E, num_slots) if is_placed else _empty_placement(ids_N, num_slots)
    N, D = ids_N.shape[0], x_TD.shape[1]
    y_ND = torch.empty(N, D, dtype=torch.float8_e4m3fn if form == "fp8" else x_TD.dtype, device=x_TD.device)
    scale_N1 = torch.empty(N, 1, dtype=torch.float32, device=x_TD.device) if form == "fp8" else None
    places = placement.place_N, placement.counts_S, placement.ends_S
    launch_gather(x_TD.contiguous(), scores_N, ids_N, slot_of_E, places, y_ND, scale_N1, _MODES[form], is_placed)
    return PlacedRows(y_ND, scale_N1, placement, x_TD.dtype)


def combine_rows(parts_PND: Tensor, placement: Placement | None, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """y_TD = the sum over a token's rows of the sum of P parts [P, N, D]; rows that are nowhere count as zeros.

    Without a placement row and token are one.
    """
    D = parts_PND.shape[2]
    if placement is None and parts_PND.shape[0] == 1 and parts_PND.dtype == dtype:
        return parts_PND[0]
    y_TD = torch.empty(num_tokens, D, dtype=dtype, device=parts_PND.device)
    if num_tokens == 0:
        return y_TD
    if parts_PND.is_cuda and HAS_TRITON:
        from actors.kernels.route_triton import launch_combine

        launch_combine(parts_PND, None if placement is None else placement.place_N, y_TD)
        return y_TD
    y_ND = parts_PND.sum(0).to(dtype)
    if placement is None:
        return y_ND
    rows_ND = y_ND.index_select(0, placement.place_N.clamp(min=0))
    rows_ND.masked_fill_((placement.place_N < 0)[:, None], 0)
    return rows_ND.view(num_tokens, -1, D).sum(1)


def _empty_placement(ids_N: Tensor, num_slots: int) -> Placement:
    device = ids_N.device
    return Placement(
        torch.empty(ids_N.shape[0], dtype=torch.int32, device=device),
        torch.empty(num_slots, dtype=torch.int64, device=device),
        torch.empty(num_slots, dtype=torch.int32, device=device),
    )


def _gather_in_torch(
    x_TD: Tensor, ids_N: Tensor, scores_N: Tensor | None, placement: Placement, form: Form
) -> PlacedRows:
    top_k = max(1, ids_N.shape[0] // max(1, x_TD.shape[0]))
    rows_ND = x_TD.repeat_interleave(top_k, dim=0)
    if scores_N is not None:
        rows_ND = rows_ND * scores_N[:, None]
    # Rows that are nowhere go behind the placed ones, where nobody reads.
    is_here_N = placement.place_N >= 0
    behind_N = placement.ends_S[-1] + (~is_here_N).cumsum(0) - 1
    placed_ND = torch.empty_like(rows_ND).index_copy_(0, placement.place_N.long().where(is_here_N, behind_N), rows_ND)
    return form_rows(placed_ND, form, placement)


def form_rows(x_ND: Tensor, form: Form, placement: Placement | None = None) -> PlacedRows:
    """Rows that lie in their places, in the form that weights want."""
    if form == "fp8":
        return PlacedRows(*quantize_rows(x_ND), placement, x_ND.dtype)
    return PlacedRows(to_word_order(x_ND) if form == "int4" else x_ND, None, placement, x_ND.dtype)
