"""What attention needs to know of a step's rows in one page group.

Owns where each row's key and value are written, and which pages each row reads: everything so far in global layers,
the current chunk in chunked ones. Computed per request and shared by all layers of the group. Knows nothing of
weights, nor of where token ids come from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.attention.requests import Ids, PageTable
from actors.kernels.prefill_attention import PackedRuns

DECODE_BYTES = 1 << 20  # keys and values that one decode group reads per layer on a CPU, so that they stay in cache
SIMILAR_TOKENS = 64  # contexts up to this long are padded to each other whatever their ratio
RUN_TOKENS = 512  # queries of one masked run
MASK_KEYS = 1 << 16  # masks for more keys than this are made when used, not held for the step


@dataclass(frozen=True, slots=True)
class Piece:
    """A request's tokens [start, end) of this step, at `row` and after. The last `num_granted` pages of its table are
    new.
    """

    row: int
    start: int
    end: int
    table: PageTable
    num_granted: int

    def check_pages(self, page_tokens: int) -> None:
        """Raises ValueError where pages for the piece were not granted."""
        if self.table.num_pages * page_tokens < self.end:
            raise ValueError(f"{self.table.num_pages} pages were granted for {self.end} tokens")


@dataclass(frozen=True, slots=True)
class PageRun:
    """The pages of some rows' keys: `first` where they lie one after another in memory, else None; and their ids."""

    num_pages: int
    first: int | None
    ids_N: Tensor


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one token each that read about as many keys; `rows` is a slice where they lie together.

    `mask_B11L` is added to the scores (0 or -inf); None where every row reads all `num_keys` keys.
    """

    rows: slice | Tensor
    num_rows: int
    num_keys: int
    pages: PageRun
    mask_B11L: Tensor | None


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one request, inside one chunk where layers are chunked.

    `pages` is None where the run begins its context: it then reads its own keys only, causally. Otherwise it reads
    `num_keys` keys, the last of which belongs to the run's last token.
    """

    rows: slice
    num_queries: int
    num_keys: int
    pages: PageRun | None
    mask_QL: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedRuns:
    """Runs that read the cache: which rows they are, and where their keys are (int64: page * page_tokens + offset)."""

    runs: PackedRuns
    rows: slice | Tensor
    key_slots_N: Tensor


@dataclass(frozen=True, slots=True)
class FreshRuns:
    """Runs of equal length, one after another, that begin their context and read their own keys only."""

    rows: slice
    num_runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRuns:
    """What `mixed.py` needs of the rows behind those of one token. Runs never cross the end of a chunk.

    `cached`: all runs that are not fresh, if any.
    """

    fresh: tuple[FreshRuns, ...]
    cached: CachedRuns | None


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """One page group's view of a step. Decode rows come first, then runs. Where kernels compute decode rows, and
    `prompts` the others, there are no `decode` and `runs`.
    """

    write_slots_T: Tensor  # int64: page * page_tokens + offset, where each row's key and value go
    fresh_pages_N: Tensor | None  # granted pages that the step does not fill: another request's leavings are in them
    decode: tuple[DecodeGroup, ...]
    runs: tuple[Run, ...]
    prompts: PromptRuns | None = None

    @property
    def whole_decode(self) -> DecodeGroup | None:
        """The decode group that is all rows in their order, if there is one: its result is the step's."""
        alone = len(self.decode) == 1 and not self.runs and isinstance(self.decode[0].rows, slice)
        return self.decode[0] if alone else None

    @property
    def whole_run(self) -> Run | None:
        """The run that is all rows, if there is one."""
        return self.runs[0] if len(self.runs) == 1 and not self.decode else None


def bottom_right_mask(num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[Q, L] of 0 and -inf: the last query sees every key, each one before it one key less."""
    full_QL = torch.full((num_queries, num_keys), float("-inf"), dtype=dtype, device=device)
    return full_QL.triu_(num_keys - num_queries + 1)


def write_slots(page_tokens: int, singles: Sequence[Piece], longer: Sequence[Piece]) -> Ids:
    """page * page_tokens + offset of every row, in the order of the rows."""
    size = page_tokens
    parts = [np.array([p.table.pages[p.start // size] * size + p.start % size for p in singles], dtype=np.int64)]
    parts += [token_slots(page_tokens, piece.table, piece.start, piece.end) for piece in longer]
    return np.concatenate(parts)


def token_slots(page_tokens: int, table: PageTable, start: int, stop: int) -> Ids:
    """page * page_tokens + offset of the tokens [start, stop) of a request."""
    positions = np.arange(start, stop, dtype=np.int64)
    return table.pages[positions // page_tokens] * page_tokens + positions % page_tokens


class GroupBuilder:
    """Builds GroupInputs for one page group. `chunk_tokens` 0: rows read their whole context."""

    def __init__(
        self, page_tokens: int, chunk_tokens: int, token_bytes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._page_tokens = page_tokens
        self._chunk_tokens = chunk_tokens
        self._dtype = dtype
        self._device = device
        # On a GPU one launch for all rows is worth more than what padding costs.
        self._decode_keys = DECODE_BYTES // token_bytes if device.type == "cpu" else 1 << 62

    def build(self, singles: Sequence[Piece], longer: Sequence[Piece]) -> GroupInputs:
        """`singles` are pieces of one token, in rows [0, len(singles)); `longer` lie behind them."""
        for piece in (*singles, *longer):
            piece.check_pages(self._page_tokens)
        return GroupInputs(
            write_slots_T=self._upload(write_slots(self._page_tokens, singles, longer)),
            fresh_pages_N=self._fresh_pages((*singles, *longer)),
            decode=tuple(self._decode_groups(singles)),
            runs=tuple(run for piece in longer for run in self._runs(piece)),
        )

    def _fresh_pages(self, pieces: Sequence[Piece]) -> Tensor | None:
        """New pages at or beyond a piece's start, save those that the step fills."""
        size = self._page_tokens
        fresh: list[int] = []
        for piece in pieces:
            if not piece.num_granted:
                continue
            granted = piece.table.num_pages - piece.num_granted
            unfilled = max(granted, piece.end // size, -(-piece.start // size))
            fresh.extend(piece.table.pages[unfilled:].tolist())
        return self._upload(np.array(fresh, dtype=np.int64)) if fresh else None

    def _context_start(self, position: int) -> int:
        """First position that the token at `position` sees."""
        return position - position % self._chunk_tokens if self._chunk_tokens else 0

    def _decode_groups(self, singles: Sequence[Piece]) -> Iterator[DecodeGroup]:
        lengths = [piece.end - self._context_start(piece.start) for piece in singles]
        order = sorted(range(len(singles)), key=lambda row: -lengths[row])
        lie_together = order == list(range(len(singles)))
        for low, high in _partition([lengths[row] for row in order], self._decode_keys):
            rows = order[low:high]
            yield DecodeGroup(
                rows=slice(low, high) if lie_together else self._upload(np.array(rows, dtype=np.int64)),
                num_rows=high - low,
                num_keys=lengths[rows[0]],
                pages=self._decode_pages([singles[row] for row in rows], lengths[rows[0]]),
                mask_B11L=self._decode_mask([lengths[row] for row in rows]),
            )

    def _decode_pages(self, pieces: Sequence[Piece], num_keys: int) -> PageRun:
        """Pages of every row, as many as the longest needs; shorter rows repeat their own first page."""
        if len(pieces) == 1:
            return self._page_run(pieces[0], self._context_start(pieces[0].start), pieces[0].end)
        width = -(-num_keys // self._page_tokens)
        ids: Ids = np.empty((len(pieces), width), dtype=np.int64)
        for i, piece in enumerate(pieces):
            own = piece.table.pages[self._context_start(piece.start) // self._page_tokens :][:width]
            ids[i, : len(own)] = own
            ids[i, len(own) :] = own[0]
        return PageRun(width, None, self._upload(ids.reshape(-1)))

    def _decode_mask(self, lengths: Sequence[int]) -> Tensor | None:
        if lengths[0] == lengths[-1]:
            return None
        lengths_B1 = self._upload(np.array(lengths, dtype=np.int64))[:, None]
        beyond_BL = torch.arange(lengths[0], device=self._device) >= lengths_B1
        mask_BL = torch.zeros(beyond_BL.shape, dtype=self._dtype, device=self._device)
        return mask_BL.masked_fill_(beyond_BL, float("-inf"))[:, None, None]

    def _runs(self, piece: Piece) -> Iterator[Run]:
        """Splits a piece where chunks end, and masked parts further into runs of RUN_TOKENS."""
        start = piece.start
        while start < piece.end:
            context = self._context_start(start)
            stop = min(piece.end, context + self._chunk_tokens) if self._chunk_tokens else piece.end
            if start > context:
                stop = min(stop, start + RUN_TOKENS)
            yield self._run(piece, context, start, stop)
            start = stop

    def _run(self, piece: Piece, context: int, start: int, stop: int) -> Run:
        num_queries, num_keys = stop - start, stop - context
        rows = slice(piece.row + start - piece.start, piece.row + stop - piece.start)
        if start == context:
            return Run(rows, num_queries, num_keys, None, None)
        masked = num_queries > 1 and num_keys <= MASK_KEYS
        return Run(
            rows,
            num_queries,
            num_keys,
            self._page_run(piece, context, stop),
            bottom_right_mask(num_queries, num_keys, self._dtype, self._device) if masked else None,
        )

    def _page_run(self, piece: Piece, context: int, end: int) -> PageRun:
        ids = piece.table.pages[context // self._page_tokens : -(-end // self._page_tokens)]
        consecutive = int(ids[-1]) - int(ids[0]) == len(ids) - 1 and bool(np.all(np.diff(ids) == 1))
        return PageRun(len(ids), int(ids[0]) if consecutive else None, self._upload(ids))

    def _upload(self, values: Ids) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _partition(lengths: Sequence[int], max_keys: int) -> Iterator[tuple[int, int]]:
    """Cuts `lengths` (longest first) into [low, high) whose padded size is at most `max_keys` and mostly real."""
    low = 0
    for high in range(1, len(lengths) + 1):
        if high < len(lengths):
            longest = lengths[low]
            fits = longest * (high + 1 - low) <= max_keys
            similar = longest <= SIMILAR_TOKENS or 2 * lengths[high] >= longest
            if fits and similar:
                continue
        yield low, high
        low = high
