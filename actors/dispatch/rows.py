"""Rows as they travel: a slot number and an activation side by side, so that one message carries both.

Owns a row's bytes, reusable buffers of rows, the choice of replicas and the order of sending. Knows nothing of groups.
Shapes: T tokens, K experts per token, N = T * K rows in the order (token, k), D hidden, P destinations.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from actors.dispatch.contract import RoutingTable

Integers = np.ndarray[Any, np.dtype[np.int64]]

META_BYTES = 16  # the slot as int64, padded so that activations stay aligned for vector loads
WORD_BYTES = 8
SLOT_BITS = 20
SLOT_MASK = (1 << SLOT_BITS) - 1
PADDING_SLOT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShape:
    """What a token brings to dispatch: `hidden` values of `dtype` on `device`, for each of its experts."""

    hidden: int
    experts_per_token: int
    dtype: torch.dtype
    device: torch.device

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, a multiple of 16."""
        return META_BYTES + -(-self.hidden * self.dtype.itemsize // META_BYTES) * META_BYTES


class RowBuffer:
    """A reusable stretch of memory for rows, with a view of each field."""

    def __init__(self, shape: TokenShape) -> None:
        self._shape = shape
        self._allocate(0)

    def reserve(self, num_rows: int) -> None:
        """Makes room for `num_rows`; views and what they held are lost if it had to grow."""
        if num_rows > self.words_NW.shape[0]:
            self._allocate(1 << (num_rows - 1).bit_length())

    def _allocate(self, num_rows: int) -> None:
        shape = self._shape
        self.words_NW = torch.empty(num_rows, shape.row_bytes // WORD_BYTES, dtype=torch.int64, device=shape.device)
        self.slots_N = self.words_NW[:, 0]
        first = META_BYTES // shape.dtype.itemsize
        self.x_ND = self.words_NW.view(shape.dtype)[:, first : first + shape.hidden]
        if shape.device.type == "cpu":
            self.host_slots_N: Integers = self.slots_N.numpy()
            self.host_x_ND = _as_numpy(self.x_ND)


def _as_numpy(x: Tensor) -> np.ndarray[Any, Any]:
    """The same memory as numpy sees it, to copy whole rows: numpy has no bfloat16, so those are called integers."""
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


class Placer(Protocol):
    """Gives every row of an attention rank a replica and a place in its buffer: by destination, then by slot.

    Tokens take the replicas of an expert in turn, each rank and layer starting at another one.
    """

    def place(
        self, layer_idx: int, expert_ids_TK: Tensor, rows_ND: Tensor, buffer: RowBuffer, block_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Writes the rows into `buffer`. Returns (place_N, first_P), int64.

        place_N: the buffer's row of each (token, k). Destination d has the rows from d * block_rows on, unused ones
        marked; or, where `block_rows` is 0, those from first_P[d] on, up to the next one's.
        """
        ...


def make_placer(routing: RoutingTable, destinations: tuple[int, ...], rank: int, device: torch.device) -> Placer:
    """The placer for `device`: on a GPU nothing waits for the host; a CPU counts with numpy, 5x quicker per call."""
    return (HostPlacer if device.type == "cpu" else DevicePlacer)(routing, destinations, rank)


class DevicePlacer:
    """Places rows with torch operations alone; no value is read by the host."""

    def __init__(self, routing: RoutingTable, destinations: tuple[int, ...], rank: int) -> None:
        device = routing.ranks_MER.device
        self._keys, self._replicas = _keys_of_layer(routing, destinations)
        self._num_replicas = routing.ranks_MER.shape[2]
        self._destinations_P = torch.arange(len(destinations), device=device)
        self._rank = rank
        self._counter = torch.arange(0, device=device)

    def place(
        self, layer_idx: int, expert_ids_TK: Tensor, rows_ND: Tensor, buffer: RowBuffer, block_rows: int
    ) -> tuple[Tensor, Tensor]:
        num_rows = rows_ND.shape[0]
        key_N, order_N = torch.sort(self._choose(layer_idx, expert_ids_TK), stable=True)
        first_P = torch.searchsorted(key_N, self._destinations_P << SLOT_BITS)
        sorted_place_N = self._count(num_rows)
        if block_rows:
            shift_P = self._destinations_P * block_rows - first_P
            sorted_place_N = sorted_place_N + shift_P.index_select(0, key_N >> SLOT_BITS)
            buffer.slots_N[: block_rows * first_P.shape[0]] = PADDING_SLOT
        buffer.slots_N.index_copy_(0, sorted_place_N, key_N & SLOT_MASK)
        place_N = torch.empty_like(order_N).scatter_(0, order_N, sorted_place_N)
        buffer.x_ND.index_copy_(0, place_N, rows_ND)
        return place_N, first_P

    def _choose(self, layer_idx: int, expert_ids_TK: Tensor) -> Tensor:
        if self._num_replicas == 1:
            return self._keys[layer_idx].index_select(0, expert_ids_TK.flatten())
        turn_T1 = self._count(expert_ids_TK.shape[0])[:, None] + (self._rank + layer_idx)
        replica_TK = turn_T1 % self._replicas[layer_idx][expert_ids_TK]
        return self._keys[layer_idx].index_select(0, (expert_ids_TK * self._num_replicas + replica_TK).flatten())

    def _count(self, num: int) -> Tensor:
        if num > self._counter.shape[0]:
            self._counter = torch.arange(1 << (num - 1).bit_length(), device=self._counter.device)
        return self._counter[:num]


class HostPlacer:
    """Places rows with numpy, whose calls on a few numbers cost a fraction of torch's."""

    def __init__(self, routing: RoutingTable, destinations: tuple[int, ...], rank: int) -> None:
        keys, replicas = _keys_of_layer(routing, destinations)
        self._keys = [keys_N.numpy() for keys_N in keys]
        self._replicas = [replicas_E.numpy() for replicas_E in replicas]
        self._num_replicas = routing.ranks_MER.shape[2]
        self._destinations_P = np.arange(len(destinations))
        self._rank = rank

    def place(
        self, layer_idx: int, expert_ids_TK: Tensor, rows_ND: Tensor, buffer: RowBuffer, block_rows: int
    ) -> tuple[Tensor, Tensor]:
        chosen_N = self._choose(layer_idx, expert_ids_TK.numpy())
        order_N = chosen_N.argsort(kind="stable")
        key_N = chosen_N[order_N]
        first_P = key_N.searchsorted(self._destinations_P << SLOT_BITS)
        sorted_place_N = np.arange(len(key_N))
        slots_N = buffer.host_slots_N
        if block_rows:
            sorted_place_N += (self._destinations_P * block_rows - first_P)[key_N >> SLOT_BITS]
            slots_N[: block_rows * len(first_P)] = PADDING_SLOT
        slots_N[sorted_place_N] = key_N & SLOT_MASK
        place_N = np.empty_like(order_N)
        place_N[order_N] = sorted_place_N
        buffer.host_x_ND[place_N] = _as_numpy(rows_ND)
        return torch.from_numpy(place_N), torch.from_numpy(first_P)

    def _choose(self, layer_idx: int, expert_ids_TK: Integers) -> Integers:
        if self._num_replicas == 1:
            return self._keys[layer_idx].take(expert_ids_TK.reshape(-1))
        turn_T1 = np.arange(len(expert_ids_TK))[:, None] + (self._rank + layer_idx)
        replica_TK = turn_T1 % self._replicas[layer_idx][expert_ids_TK]
        place_TK: Integers = expert_ids_TK * self._num_replicas + replica_TK
        return self._keys[layer_idx].take(place_TK.reshape(-1))


def _keys_of_layer(routing: RoutingTable, destinations: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer: keys of the experts' replicas [E * R], replicas of each [E]. Keys sort by destination and slot."""
    if int(routing.slots_MER.max()) > SLOT_MASK:
        raise ValueError(f"a rank holds more than {SLOT_MASK + 1} slots of one layer")
    position = {rank: d for d, rank in enumerate(destinations)}
    positions = [position[rank] for rank in routing.ranks_MER.flatten().tolist()]
    positions_MER = torch.tensor(positions, device=routing.ranks_MER.device).view_as(routing.ranks_MER)
    keys_MER = (positions_MER << SLOT_BITS) | routing.slots_MER
    return list(keys_MER.flatten(1)), list(routing.num_replicas_ME)


def scale_rows(x_TD: Tensor, scores_TK: Tensor) -> Tensor:
    """[N, D]: each token times each of its scores, as every dispatch scales (the expert's input, in x's dtype)."""
    if scores_TK.shape[1] == 1:
        return (x_TD * scores_TK).to(x_TD.dtype)
    return (x_TD[:, None] * scores_TK[..., None]).flatten(0, 1).to(x_TD.dtype)
