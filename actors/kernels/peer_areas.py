"""Memory that ranks of an epoch write into each other's: where each field lies, and the words that say what is there.

Owns the layout of a rank's area and this rank's view of all of them. Knows nothing of how the memory is mapped
(`dispatch/peer_memory.py`), nor of what moves rows (`peer_rows.py`).

Sources are the ranks that bring tokens, destinations those that hold experts, both numbered within their own list.
Every layer of every step has a sequence number, the same on all ranks; a flag says that its row is there by holding it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from actors.kernels.peer_end import Waits

WORD_BYTES = 8
LINE_BYTES = 128
SEQUENCE_SHIFT = 24  # a word is the sequence number, above what it carries: slot + 1 of a row, or how many rows come
CARRIED_MASK = (1 << SEQUENCE_SHIFT) - 1
SLOT_BITS = 20
SLOT_MASK = (1 << SLOT_BITS) - 1
PARITIES = 2  # a source is at most one layer ahead of the slowest destination

CLOSED, OPENED = 0, 1
"""Words of `Exchange.state` before BLAMED: the last sequence number that this rank is done with, and the one that it is
at."""


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class AreaLayout:
    """Byte offsets of the fields of an area; the same on every rank, whatever its roles.

    `capacity` is the most rows of one source. Fields: rows [parity, source, capacity, D] with `row_flags` and
    `arrivals` [parity, source] for what sources push; results [capacity, D] with `result_flags` and `finished`
    [destination] for what comes back.
    """

    hidden: int
    dtype: torch.dtype
    capacity: int
    num_sources: int
    num_destinations: int

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize

    @property
    def alignment(self) -> int:
        """Bytes to which every row is aligned: 16 where vectors may be stored, else one element."""
        return 16 if self.row_bytes % 16 == 0 else self.dtype.itemsize

    @property
    def results(self) -> int:
        return _aligned(PARITIES * self.num_sources * self.capacity * self.row_bytes)

    @property
    def row_flags(self) -> int:
        return self.results + _aligned(self.capacity * self.row_bytes)

    @property
    def arrivals(self) -> int:
        return self.row_flags + _aligned(PARITIES * self.num_sources * self.capacity * WORD_BYTES)

    @property
    def result_flags(self) -> int:
        return self.arrivals + _aligned(PARITIES * self.num_sources * WORD_BYTES)

    @property
    def finished(self) -> int:
        return self.result_flags + _aligned(self.capacity * WORD_BYTES)

    @property
    def num_bytes(self) -> int:
        return self.finished + _aligned(self.num_destinations * WORD_BYTES)

    def rows_at(self, parity: int, row: int) -> int:
        """Where row `row` of those that sources push begins; rows begin at 0."""
        return (parity * self.num_sources * self.capacity + row) * self.row_bytes

    def row_flags_at(self, parity: int, row: int) -> int:
        return self.row_flags + (parity * self.num_sources * self.capacity + row) * WORD_BYTES

    def arrivals_at(self, parity: int, source: int) -> int:
        return self.arrivals + (parity * self.num_sources + source) * WORD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAreas:
    """The areas of all ranks, as this rank reaches them.

    `buffers[rank]`: uint8 [num_bytes]. `bases`: their addresses, int64 [world], on the device.
    """

    layout: AreaLayout
    buffers: tuple[Tensor, ...]
    bases: Tensor

    def rows(self, rank: int, at: int, num_rows: int) -> Tensor:
        """[num_rows, D] from byte `at` of the area of `rank`."""
        layout = self.layout
        flat = self.buffers[rank][at : at + num_rows * layout.row_bytes]
        return flat.view(layout.dtype).view(num_rows, layout.hidden)

    def words(self, rank: int, at: int, num_words: int) -> Tensor:
        """int64 [num_words] from byte `at` of the area of `rank`."""
        return self.buffers[rank][at : at + num_words * WORD_BYTES].view(torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange(Waits):
    """One rank's end of it: the areas, who is who, how far it is, and how long it waits.

    `rank` is this rank; `source` and `destination` its numbers in the two lists, -1 where it is not in one.
    `source_ranks_S`, `destination_ranks_P`: int32, on the device; -1 in places of destinations that nobody has.
    `state`: int64 [3] on the device, at first two numbers that are the same on all ranks and those of no flag in the
    areas yet, and a zero.
    `partner_state`: the state of an exchange whose waits end when these are given up, and the other way round; this
    one's own where there is none.
    """

    areas: PeerAreas
    rank: int
    source: int
    destination: int
    source_ranks_S: Tensor
    destination_ranks_P: Tensor
    partner_state: Tensor

    def is_in_place_of(self, old: "Exchange") -> bool:
        """Whether what was captured with `old` means the same here: this rank's memory, its place and all offsets are
        the same, and `old` was not given up.
        """
        own, before = (e.areas.buffers[e.rank].data_ptr() for e in (self, old))
        return (
            own == before
            and self.areas.layout == old.areas.layout
            and len(self.areas.bases) == len(old.areas.bases)
            and (self.source, self.destination, self.timeout_s) == (old.source, old.destination, old.timeout_s)
            and not old.is_aborted
            and old.given_up is None
        )

    def moved_into(self, old: "Exchange") -> "Exchange":
        """This one in the tables of `old`, which say from now on what its own say: on the current stream."""
        for kept, made in (
            (old.areas.bases, self.areas.bases),
            (old.source_ranks_S, self.source_ranks_S),
            (old.destination_ranks_P, self.destination_ranks_P),
            (old.state, self.state),
        ):
            kept.copy_(made)
        return replace(old, areas=replace(old.areas, buffers=self.areas.buffers), rank=self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Which of the rows' places a layer of a step uses; the same on all ranks.

    `block_rows`: rows of each source's block, at least as many as any source brings, at most the capacity. `parity`:
    0 or 1; layers that follow one another take turns. `lag`: how many sequence numbers a destination may be behind when
    a source goes on: 1, or 0 where the next layer has the same parity.
    """

    block_rows: int
    parity: int
    lag: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRoutes:
    """Where the experts of a layer are. E experts, R replicas at most.

    `keys_ER`: int64, number of the destination << SLOT_BITS | slot. `num_replicas_E`: int64. Token t of a source takes
    replica (t + `first`) % num_replicas, so that sources and layers begin at different ones.
    """

    keys_ER: Tensor
    num_replicas_E: Tensor
    first: int
