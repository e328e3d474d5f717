"""What the ranks of one attention unit do together: sums of their partial results, and gathers of their columns.

Owns which way a call takes: nowhere (a rank alone), over the epoch's group, or through memory that the ranks map into
each other. Knows nothing of what is summed. All ways give the same bits on every rank of the unit, so that ranks which
choose by what they got choose alike.

Every member makes the same calls with the same shapes in the same order. All members of the group are of the unit.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig
from actors.dispatch.group import EpochGroup
from actors.dispatch.peer_memory import Mapping, PeerMemory, SymmetricMemory
from actors.dispatch.residual import GroupResidual, Residual, SharedResidual
from actors.dispatch.rows import TokenShape
from actors.kernels.draw import Draws, draw_tokens
from actors.kernels.largest import largest
from actors.kernels.norm import add_rms_norm
from actors.kernels.peer_residual import PeerResidual, ResidualLayout, add_sums
from actors.kernels.peer_sums import (
    WORD_BYTES,
    PeerSums,
    SumLayout,
    add_all_reduced_rms_norm,
    add_all_reduced_rows,
    all_reduce_rows,
    draw_columns,
    first_largest,
    gather_columns,
    largest_columns,
)

TAG = 1
MEETING_TIMEOUT_S = 30.0
LEAST_SUMMED_ROWS = 256  # there is room to sum so many rows at once, whatever steps have
MOST_SUMMED_ROWS = 2304  # and never for more: four times as many lie in mapped memory
GATHER_BYTES = 16 * 1024 * 1024
NEVER = 1 << 62


class TensorParallel(Protocol):
    """One rank's part in its attention unit. `index` is its shard of `size`.

    Methods raise RankError when a peer fails or does not answer in time, as far as the host notices; what CUDA kernels
    notice is told by the group (`EpochGroup.await_event`).
    """

    size: int
    index: int
    min_large_rows: int
    """Steps of so many rows and more, which are not captured, are for `residual`."""
    shared_bytes: int
    """Device memory that joining takes."""

    def join(self, group: EpochGroup, positions: Sequence[int], fresh: bool) -> bool:
        """Takes the group of a new epoch, which is formed. `positions`: of the members in it, in the order of shards.

        Not `fresh`: the members are as before and have lost nothing. Returns whether CUDA graphs that were captured
        before are void. Collective.
        """
        ...

    def all_reduce(self, x_TD: Tensor) -> Tensor:
        """The sum of x over the members; may be x itself, changed."""
        ...

    def add_all_reduced(self, h_TD: Tensor, parts: Sequence[Tensor]) -> None:
        """h += the members' sum of the sum of their parts (at most two). Values of parts are undefined afterwards."""
        ...

    def add_rms_norm(self, h_TD: Tensor, parts: Sequence[Tensor], weight_D: Tensor, eps: float) -> Tensor:
        """`add_all_reduced` where there are parts; returns rms_norm(h) * weight (see `kernels/norm.py`)."""
        ...

    def residual(self, rows: Sequence[slice], h_TD: Tensor, weight_D: Tensor, eps: float) -> Residual:
        """The residual stream of a large step that begins with `h_TD`, which it may keep, in parts of so many rows;
        x begins as rms_norm(h) * weight. Of one step at a time.
        """
        ...

    def all_gather_columns(self, x_BV: Tensor) -> Tensor:
        """[B, size * V]: member i's columns from i * V on."""
        ...

    def largest_columns(self, x_BV: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [B] and int64 [B]: the largest of what `all_gather_columns` would return, and its column; see
        `kernels/largest.py`.
        """
        ...

    def draw_columns(self, x_BV: Tensor, draws: Draws) -> Tensor:
        """int64 [R]: tokens drawn from what `all_gather_columns` would return; see `kernels/draw.py`."""
        ...


def make_tensor_parallel(shard: tuple[int, int], shape: TokenShape, max_rows: int = 0) -> TensorParallel:
    """For the rank with `shard` (index, of) of its unit. Memory is taken when it joins its first epoch.

    `max_rows`: of any step; 0: none is a large one.
    """
    index, size = shard
    if size == 1:
        return ALONE
    if shape.device.type == "cuda" and shape.hidden * shape.dtype.itemsize % WORD_BYTES == 0:
        return OverPeerMemory(index, size, shape, max_rows)
    return OverGroup(index, size)


def shard_config(config: ModelConfig, of: int) -> ModelConfig:
    """The model as the attention and the KV cache of one of `of` shards see it: its part of the heads."""
    return replace(config, num_heads=config.num_heads // of, num_kv_heads=config.num_kv_heads // of)


class Alone:
    """A unit of one: its parts are the sums."""

    size = 1
    index = 0
    min_large_rows = NEVER
    shared_bytes = 0

    def join(self, group: EpochGroup, positions: Sequence[int], fresh: bool) -> bool:
        return False

    def all_reduce(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def add_all_reduced(self, h_TD: Tensor, parts: Sequence[Tensor]) -> None:
        for part_TD in parts:
            h_TD.add_(part_TD)

    def add_rms_norm(self, h_TD: Tensor, parts: Sequence[Tensor], weight_D: Tensor, eps: float) -> Tensor:
        return add_rms_norm(h_TD, parts, weight_D, eps)

    def residual(self, rows: Sequence[slice], h_TD: Tensor, weight_D: Tensor, eps: float) -> Residual:
        return GroupResidual(self.all_reduce, h_TD, weight_D, eps)

    def all_gather_columns(self, x_BV: Tensor) -> Tensor:
        return x_BV

    def largest_columns(self, x_BV: Tensor) -> tuple[Tensor, Tensor]:
        return largest(x_BV)

    def draw_columns(self, x_BV: Tensor, draws: Draws) -> Tensor:
        return draw_tokens(x_BV, draws)


ALONE = Alone()


class OverGroup:
    """Over the messages of the group: on a CPU, and for what is too large for memory that is shared."""

    min_large_rows = NEVER  # there is nothing to run beside sums
    shared_bytes = 0

    def __init__(self, index: int, size: int) -> None:
        self.index = index
        self.size = size
        self._group: EpochGroup | None = None
        self._positions: tuple[int, ...] = ()

    def join(self, group: EpochGroup, positions: Sequence[int], fresh: bool) -> bool:
        if len(positions) != self.size or group.rank != positions[self.index]:
            raise ValueError(f"shard {self.index} of {self.size} is not at {group.rank} of {list(positions)}")
        self._group, self._positions = group, tuple(positions)
        return False

    def all_reduce(self, x_TD: Tensor) -> Tensor:
        if self._joined.all_reduce(x_TD):
            return x_TD
        terms = self._exchange(x_TD)
        total_TD = terms[0].float()
        for term_TD in terms[1:]:
            total_TD = total_TD + term_TD.float()
        return total_TD.to(x_TD.dtype)

    def add_all_reduced(self, h_TD: Tensor, parts: Sequence[Tensor]) -> None:
        if parts:
            h_TD.add_(self.all_reduce(_added_up(parts)))

    def add_rms_norm(self, h_TD: Tensor, parts: Sequence[Tensor], weight_D: Tensor, eps: float) -> Tensor:
        reduced = (self.all_reduce(_added_up(parts)),) if parts else ()
        return add_rms_norm(h_TD, reduced, weight_D, eps)

    def residual(self, rows: Sequence[slice], h_TD: Tensor, weight_D: Tensor, eps: float) -> Residual:
        return GroupResidual(self.all_reduce, h_TD, weight_D, eps)

    def all_gather_columns(self, x_BV: Tensor) -> Tensor:
        return torch.cat(self._exchange(x_BV), dim=1)

    def largest_columns(self, x_BV: Tensor) -> tuple[Tensor, Tensor]:
        values_B, columns_B = largest(x_BV)
        of_all_BW2 = torch.stack(self._exchange(torch.stack((values_B.view(torch.int32), columns_B.int()), 1)), 1)
        return first_largest(of_all_BW2[..., 0].contiguous().view(torch.float32), of_all_BW2[..., 1], x_BV.shape[1])

    def draw_columns(self, x_BV: Tensor, draws: Draws) -> Tensor:
        return draw_tokens(self.all_gather_columns(x_BV.index_select(0, draws.row_R)), draws.of_rows())

    @property
    def _joined(self) -> EpochGroup:
        if self._group is None:
            raise ValueError("no epoch was joined")
        return self._group

    def _exchange(self, x: Tensor) -> list[Tensor]:
        """Every member's x, in the order of shards."""
        x = x.contiguous()
        everyone = [x if i == self.index else torch.empty_like(x) for i in range(self.size)]
        others = [(position, i) for i, position in enumerate(self._positions) if i != self.index]
        transfer = self._joined.post(
            [(position, x) for position, _ in others], [(position, everyone[i]) for position, i in others], TAG
        )
        transfer.wait()
        return everyone


class OverPeerMemory(OverGroup):
    """Through memory that the members map into each other: one kernel per call, and all of it can be captured.

    Rows above MOST_SUMMED_ROWS go over the group, unless a graph is being captured: then in several calls. Steps of
    more rows have room of their own (`residual`). The mapping outlives epochs that nobody is lost in, so that graphs do
    too: all members have ended the same calls then, and what these leave empty is empty.
    """

    def __init__(
        self, index: int, size: int, shape: TokenShape, max_rows: int = 0, memory: PeerMemory | None = None
    ) -> None:
        """`max_rows`: of any step. `memory`: where the members meet, if not over the group; for tests."""
        super().__init__(index, size)
        self._shape = shape
        self._memory = memory
        self._layout = SumLayout(
            world=size,
            hidden=shape.hidden,
            dtype=shape.dtype,
            max_rows=min(max(max_rows, LEAST_SUMMED_ROWS), MOST_SUMMED_ROWS),
            gather_bytes=GATHER_BYTES,
        )
        self._large_layout: ResidualLayout | None = None
        self.shared_bytes = self._layout.num_bytes
        if max_rows > self._layout.max_rows:
            self._large_layout = ResidualLayout(world=size, hidden=shape.hidden, dtype=shape.dtype, max_rows=max_rows)
            self.min_large_rows = self._layout.max_rows + 1
            self.shared_bytes += self._large_layout.num_bytes
        self._mapping: Mapping | None = None
        self._peers: PeerSums | None = None
        self._large: PeerResidual | None = None
        # What is summed there is waited for by all: it goes before what else could be computed.
        self._stream = torch.cuda.Stream(shape.device, priority=-1) if shape.device.type == "cuda" else None

    def join(self, group: EpochGroup, positions: Sequence[int], fresh: bool) -> bool:
        super().join(group, positions, fresh)
        is_new = fresh or self._peers is None
        if is_new:
            self._peers = self._large = self._mapping = None  # before its successor takes the memory
            memory = self._memory or SymmetricMemory(group, self._shape.device, MEETING_TIMEOUT_S)
            self._mapping = memory.map("sums", self._layout.num_bytes)
            self._peers = self._end_of(self._mapping, group.operation_timeout_s)
            self._rehearse(replace(self._peers, timeout_s=MEETING_TIMEOUT_S))
            if self._large_layout is not None:
                self._large = self._map_large(self._large_layout, memory, group.operation_timeout_s)
        for peers in (self._peers, self._large):
            if peers is not None:
                group.attach(_Waits(peers, self._positions))
        return is_new

    def _rehearse(self, peers: PeerSums) -> None:
        """Does what is done outside of graphs, so that what is compiled for it is compiled now."""
        x_BV = torch.zeros(1, 64, dtype=self._shape.dtype, device=self._shape.device)
        gather_columns(peers, x_BV)
        for least_R in (None, torch.ones(1, dtype=torch.int64, device=x_BV.device)):
            draw_columns(peers, x_BV, Draws.any_of(x_BV, least_R))

    def all_reduce(self, x_TD: Tensor) -> Tensor:
        if self._goes_over_group(x_TD):
            return super().all_reduce(x_TD)
        pieces = x_TD.split(self._ready.max_rows)
        sums = [all_reduce_rows(self._ready, (piece_TD,)) for piece_TD in pieces]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def add_all_reduced(self, h_TD: Tensor, parts: Sequence[Tensor]) -> None:
        if not parts or self._goes_over_group(h_TD):
            super().add_all_reduced(h_TD, parts)
            return
        for rows in _pieces(h_TD.shape[0], self._ready.max_rows):
            add_all_reduced_rows(self._ready, h_TD[rows], [part_TD[rows] for part_TD in parts])

    def add_rms_norm(self, h_TD: Tensor, parts: Sequence[Tensor], weight_D: Tensor, eps: float) -> Tensor:
        if parts and h_TD.shape[0] <= self._ready.max_rows:
            return add_all_reduced_rms_norm(self._ready, h_TD, parts, weight_D, eps)
        self.add_all_reduced(h_TD, parts)
        return add_rms_norm(h_TD, (), weight_D, eps)

    def residual(self, rows: Sequence[slice], h_TD: Tensor, weight_D: Tensor, eps: float) -> Residual:
        if self._large is None:
            return super().residual(rows, h_TD, weight_D, eps)
        return SharedResidual(self._large, self._stream, rows, h_TD, weight_D, eps)

    def all_gather_columns(self, x_BV: Tensor) -> Tensor:
        return gather_columns(self._ready, x_BV.contiguous())

    def largest_columns(self, x_BV: Tensor) -> tuple[Tensor, Tensor]:
        parts = [largest_columns(self._ready, x_BV[rows]) for rows in _pieces(x_BV.shape[0], self._ready.max_rows)]
        values, columns = zip(*parts, strict=True)
        return (values[0], columns[0]) if len(parts) == 1 else (torch.cat(values), torch.cat(columns))

    def draw_columns(self, x_BV: Tensor, draws: Draws) -> Tensor:
        if len(draws.row_R) > self._ready.max_rows:
            return super().draw_columns(x_BV, draws)
        return draw_columns(self._ready, x_BV, draws)

    @property
    def _ready(self) -> PeerSums:
        if self._peers is None:
            raise ValueError("no epoch was joined")
        return self._peers

    def _goes_over_group(self, x_TD: Tensor) -> bool:
        is_large = x_TD.shape[0] > self._ready.max_rows
        return is_large and not (x_TD.is_cuda and torch.cuda.is_current_stream_capturing())

    def _end_of(self, mapping: Mapping, timeout_s: float) -> PeerSums:
        """This rank's end, with the members in the order of shards."""
        return PeerSums(
            layout=self._layout,
            rank=self.index,
            buffers=tuple(mapping.buffers[position] for position in self._positions),
            bases=mapping.bases.index_select(0, self._order()),
            state=self._state(self._layout.state_words),
            host=self._host(),
            timeout_s=timeout_s,
        )

    def _map_large(self, layout: ResidualLayout, memory: PeerMemory, timeout_s: float) -> PeerResidual:
        """Collective. Sums a row in every way, so that what is compiled for it is compiled now."""
        shape = self._shape
        mapping = memory.map("residual", layout.num_bytes)
        large = PeerResidual(
            layout=layout,
            rank=self.index,
            buffers=tuple(mapping.buffers[position] for position in self._positions),
            bases=mapping.bases.index_select(0, self._order()),
            state=self._state(layout.state_words),
            host=self._host(),
            timeout_s=timeout_s,
            keeper=mapping,
        )
        weight_D = torch.ones(shape.hidden, dtype=shape.dtype, device=shape.device)
        for weight in (weight_D, None):
            h_OD = torch.zeros(1, shape.hidden, dtype=shape.dtype, device=shape.device)
            add_sums(large, h_OD, slice(0, self.size), weight, 1.0)
        return large

    def _order(self) -> Tensor:
        return torch.tensor(self._positions, device=self._shape.device)

    def _state(self, num_words: int = 3) -> Tensor:
        return torch.zeros(num_words, dtype=torch.int64, device=self._shape.device)

    def _host(self) -> Tensor:
        return torch.zeros(2, dtype=torch.int64, pin_memory=self._shape.device.type == "cuda")


class _Waits:
    """The device's waits as the group knows them, with members by their positions in it."""

    def __init__(self, peers: PeerSums | PeerResidual, positions: tuple[int, ...]) -> None:
        self._peers = peers
        self._positions = positions

    @property
    def blamed(self) -> int | None:
        index = self._peers.given_up
        return None if index is None else self._positions[index]

    def abort(self) -> None:
        self._peers.abort()


def _added_up(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


def _pieces(num_rows: int, step: int) -> list[slice]:
    return [slice(first, first + step) for first in range(0, num_rows, step)]
