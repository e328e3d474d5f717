"""Rows as they travel: a slot number and an activation side by side, so that one message carries both.

Owns the row's bytes, reusable buffers of rows, and the order in which rows are sent. Knows nothing of groups.
Shapes: T tokens, K experts per token, N = T * K rows, D hidden, P destinations, W 8-byte words of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.dispatch.contract import RoutingTable

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

    def reserve(self, num_rows: int) -> bool:
        """Makes room for `num_rows`; what it held is lost if it had to grow. Returns whether views went stale."""
        if num_rows <= self.words_NW.shape[0]:
            return False
        self._allocate(1 << (num_rows - 1).bit_length())
        return True

    def _allocate(self, num_rows: int) -> None:
        shape = self._shape
        row_words = shape.row_bytes // WORD_BYTES
        self.words_NW = torch.empty(num_rows, row_words, dtype=torch.int64, device=shape.device)
        self.slots_N = self.words_NW[:, 0]
        first = META_BYTES // shape.dtype.itemsize
        self.x_ND = self.words_NW.view(shape.dtype)[:, first : first + shape.hidden]


class Chooser:
    """Chooses a replica for each (token, expert) and sorts the rows by destination and slot.

    Tokens take the replicas of an expert in turn, each rank and layer starting at another one. Deterministic; on the
    device; one sort.
    """

    def __init__(self, routing: RoutingTable, destinations: tuple[int, ...], rank: int) -> None:
        device = routing.ranks_MER.device
        if int(routing.slots_MER.max()) > SLOT_MASK:
            raise ValueError(f"a rank holds more than {SLOT_MASK} slots of one layer")
        position = {expert_rank: d for d, expert_rank in enumerate(destinations)}
        positions_MER = torch.tensor([position[r] for r in routing.ranks_MER.flatten().tolist()], device=device)
        keys_MER = (positions_MER.view_as(routing.ranks_MER) << SLOT_BITS) | routing.slots_MER
        self._num_replicas = keys_MER.shape[2]
        self._keys = tuple(keys_MER.flatten(1))  # of each layer, [E * R]
        self._replicas_of_layer = tuple(routing.num_replicas_ME)
        self._bounds_P = torch.arange(len(destinations), device=device) << SLOT_BITS
        self._rank = rank
        self._counter_N = torch.arange(0, device=device)

    def counter(self, num: int) -> Tensor:
        """int64 [0, 1, … num)."""
        if num > self._counter_N.shape[0]:
            self._counter_N = torch.arange(1 << (num - 1).bit_length(), device=self._counter_N.device)
        return self._counter_N[:num]

    def sort(self, layer_idx: int, expert_ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (key_N, order_N): row n of what is sent is (token, k) number order_N[n], going to key_N[n]."""
        keys = self._keys[layer_idx]
        if self._num_replicas == 1:
            chosen_N = keys.index_select(0, expert_ids_TK.flatten())
        else:
            turn_T1 = self.counter(expert_ids_TK.shape[0])[:, None] + (self._rank + layer_idx)
            replica_TK = turn_T1 % self._replicas_of_layer[layer_idx][expert_ids_TK]
            chosen_N = keys.index_select(0, (expert_ids_TK * self._num_replicas + replica_TK).flatten())
        return torch.sort(chosen_N, stable=True)

    def starts(self, key_N: Tensor) -> Tensor:
        """int64 [P]: the first of the sorted rows that goes to each destination."""
        return torch.searchsorted(key_N, self._bounds_P)
