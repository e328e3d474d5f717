"""Dispatch where every rank has every token: each computes those of its own experts, and somebody sums.

Owns which rank serves an expert that several hold. Knows nothing of the sum: `combine` returns this rank's part, and
tensor-parallel attention adds it up with its other parts in one all-reduce (`tensor_parallel.py`).

Who serves is told by the step's tokens and the layer, the same on every rank: no rank asks another. In small steps all
tokens of an expert go to one holder, so that the busiest rank reads few experts; in large ones its holders take tokens
in turn. Tables are on the device and change in place with the epochs, so that captured graphs go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.dispatch.beside import ExpertsBeside, RoutedReceipt
from actors.dispatch.contract import ExpertCompute, Receipt
from actors.kernels.holders import choose_slots
from actors.types import EMPTY_SLOT

Slots = Mapping[int, Mapping[int, tuple[int, ...]]]
"""Position in the epoch -> MoE layer -> expert of each slot."""

MAX_SMALL_ROWS = 256  # of a step whose time is that of reading weights


class ReplicatedDispatch:
    """One rank's part of a unit. Every member gets the same tokens, and `combine` returns its partial sum.

    Raises ValueError where nobody holds an expert, or where there are replicas without a slot for any before.
    """

    def __init__(
        self,
        experts: ExpertCompute,
        slots_of_position: Slots,
        moe_layers: Sequence[int],
        num_experts: int,
        position: int,
        device: torch.device,
        max_small_rows: int = MAX_SMALL_ROWS,
    ) -> None:
        self.is_capturable = True
        self._beside = ExpertsBeside(experts, device)
        self._layers = tuple(moe_layers)
        self._num_experts = num_experts
        self._num_ranks = len(slots_of_position)
        self._max_small_rows = max_small_rows
        num_slots = [sum(len(of_rank.get(la, ())) for of_rank in slots_of_position.values()) for la in moe_layers]
        self._has_spare = any(num > num_experts for num in num_slots)
        self._index = {layer: i for i, layer in enumerate(self._layers)}
        self._tables = self._build(slots_of_position, position).to(device)

    def update(self, slots_of_position: Slots, position: int) -> None:
        """The slots of the next epoch, and this rank's position in it; addresses stay."""
        self._tables.copy_from(self._build(slots_of_position, position))

    def begin_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """Has no messages to bound."""

    def end_step(self) -> None:
        """Has sent nothing: what is lost, the sums lose."""

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, layer: int) -> RoutedReceipt:
        """Keys are what `slot_of_key` gives a slot here, or -1; keys of -1 are padding."""
        layer_idx = self._index[layer]
        if not self._has_spare:
            keys_TK, slot_of_key = expert_ids_TK, self._tables.own_MEW[layer_idx, :, 0]
        elif expert_ids_TK.numel() <= self._max_small_rows:
            tables, ids_N = self._tables, expert_ids_TK.flatten()
            keys_TK = expert_ids_TK
            slot_of_key = choose_slots(ids_N, tables.holders_ME[layer_idx], tables.own_MEW[layer_idx])
        else:
            keys_TK, slot_of_key = self._turns(layer_idx, expert_ids_TK), self._tables.by_turn_MEW[layer_idx].flatten()
        return self._beside.start(layer, x_TD, keys_TK, scores_TK, slot_of_key)

    def combine(self, receipt: Receipt) -> Tensor:
        """This rank's part of y_TD: zeros for tokens whose experts are all elsewhere."""
        assert isinstance(receipt, RoutedReceipt), "receipts belong to the dispatch that made them"
        return self._beside.finish(receipt)

    def _turns(self, layer_idx: int, expert_ids_TK: Tensor) -> Tensor:
        """[T, K]: expert * W + the holder whose turn it is. Layers begin with another one."""
        held_TK = expert_ids_TK.clamp(min=0)
        turn_T1 = torch.arange(layer_idx, layer_idx + len(held_TK), device=held_TK.device)[:, None]
        keys_TK = held_TK * self._num_ranks + turn_T1 % self._tables.turns_ME[layer_idx][held_TK]
        return keys_TK.masked_fill(expert_ids_TK < 0, -1)

    def _build(self, slots_of_position: Slots, position: int) -> "_Tables":
        """Holders of an expert take turns in the order of their positions."""
        W = self._num_ranks
        own: list[list[list[int]]] = []
        by_turn: list[list[list[int]]] = []
        holders: list[list[int]] = []
        turns: list[list[int]] = []
        for layer in self._layers:
            places = _places(slots_of_position, layer, self._num_experts)
            mine = [dict(of_expert).get(position, -1) for of_expert in places]
            if self._has_spare:
                own.append([[slot if w == position else -1 for w in range(W)] for slot in mine])
            elif any(len(of_expert) > 1 for of_expert in places):
                raise ValueError(f"an expert of layer {layer} has replicas, and there was no slot for any")
            else:
                own.append([[slot] for slot in mine])
            by_turn.append([[_turn(of_expert, w, position) for w in range(W)] for of_expert in places])
            holders.append([sum(1 << holder for holder, _ in of_expert) for of_expert in places])
            turns.append([len(of_expert) for of_expert in places])
        return _Tables(*(self._as_table(rows) for rows in (own, by_turn, holders, turns)))

    def _as_table(self, rows: list[list[list[int]]] | list[list[int]]) -> Tensor:
        """[M, E] or [M, E, W]."""
        table = torch.tensor(rows, dtype=torch.int64)
        return table if self._layers else table.reshape(0, self._num_experts, 1)


@dataclass(frozen=True, slots=True)
class _Tables:
    """int64. Of M layers, E experts and W ranks.

    `own_MEW`: this rank's slot where w is this rank (without spare slots: [M, E, 1]), else -1. `by_turn_MEW`: its slot
    where holder number w is this rank, else -1. `holders_ME`: a bit for each rank. `turns_ME`: how many holders.
    """

    own_MEW: Tensor
    by_turn_MEW: Tensor
    holders_ME: Tensor
    turns_ME: Tensor

    def to(self, device: torch.device) -> "_Tables":
        return _Tables(*(getattr(self, name).to(device) for name in self.__slots__))

    def copy_from(self, other: "_Tables") -> None:
        for name in self.__slots__:
            getattr(self, name).copy_(getattr(other, name))


def _places(slots_of_position: Slots, layer: int, num_experts: int) -> list[list[tuple[int, int]]]:
    """(position, slot) of every holder of each expert, by position."""
    places: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    for position in sorted(slots_of_position):
        for slot, expert in enumerate(slots_of_position[position].get(layer, ())):
            if expert != EMPTY_SLOT:
                places[expert].append((position, slot))
    missing = [expert for expert, of_expert in enumerate(places) if not of_expert]
    if missing:
        raise ValueError(f"no rank holds expert {missing[0]} of layer {layer} ({len(missing)} missing)")
    return places


def _turn(of_expert: list[tuple[int, int]], turn: int, position: int) -> int:
    return of_expert[turn][1] if turn < len(of_expert) and of_expert[turn][0] == position else -1
