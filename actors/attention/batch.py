"""The inputs of one step, laid out once and shared by all layers.

Owns the order of a step's rows (single tokens first, longest context first; then longer pieces), their token ids and
positions, and which rows are sampled. Host work is per request, never per token. Knows nothing of weights; what
attention reads and writes is `page_groups.py`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.attention.page_groups import GroupBuilder, GroupInputs, Piece
from actors.attention.requests import Ids, RequestState, RequestTable
from actors.attention.rope import inverse_frequencies, rotations, temperatures
from actors.attention.upload import upload_array
from actors.checkpoint.config import ModelConfig
from actors.types import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """All that the model needs of a step, on its device: T rows, of which B are sampled, in the order of the work."""

    num_tokens: int
    ids_T: Tensor
    positions_T: Tensor
    rotations_T1R: Tensor
    temperatures_T11: Tensor | None  # None where all are 1
    global_inputs: GroupInputs | None  # None where no layer is of the group
    chunked_inputs: GroupInputs | None
    sampled_rows_B: Tensor | None  # None: all rows, in order
    sampled: tuple[int, ...]  # request indices, in the order of the work
    memory_rows_B: Tensor  # where the sampled tokens are to be remembered
    single_seats_B: Tensor  # int32: memory rows of the rows of one token, which come first


class Builder(Protocol):
    """Lays a step's rows out for one page group."""

    def build(self, singles: Sequence[Piece], longer: Sequence[Piece]) -> GroupInputs: ...


class BatchBuilder:
    """Lays out the work of plans. Holds nothing of a step when it is built."""

    def __init__(
        self, config: ModelConfig, global_builder: Builder | None, chunked_builder: Builder | None, device: torch.device
    ) -> None:
        """A builder for each page group that has layers."""
        self._config = config
        self._device = device
        self._frequencies_R = inverse_frequencies(config, device)
        self._global = global_builder
        self._chunked = chunked_builder

    @staticmethod
    def plain(config: ModelConfig, page_tokens: int, dtype: torch.dtype, device: torch.device) -> "BatchBuilder":
        """For `attention.StepAttention`."""
        token_bytes = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize

        def make(chunk_tokens: int) -> GroupBuilder:
            return GroupBuilder(page_tokens, chunk_tokens, token_bytes, dtype, device)

        global_builder = make(0) if config.global_layers else None
        chunked_builder = make(config.chunk_tokens) if config.chunked_layers else None
        return BatchBuilder(config, global_builder, chunked_builder, device)

    def build(self, work: Sequence[Work], requests: RequestTable) -> StepInputs:
        """Lays out work of admitted requests, whose granted pages are in their tables already.

        Raises ValueError if the work needs tokens or pages that are not there.
        """
        rows = [_Work(item, requests[item.request_idx]) for item in work]
        for row in rows:
            row.state.check(row.work)
        sampled = [row for row in rows if row.work.samples]
        ordered = _in_row_order(rows)
        positions = _concatenate([np.arange(row.work.start, row.end, dtype=np.int64) for row in ordered])
        positions_T = self._upload(positions)
        return StepInputs(
            num_tokens=len(positions),
            ids_T=self._token_ids(ordered, requests.last_tokens_R),
            positions_T=positions_T,
            rotations_T1R=rotations(positions_T, self._frequencies_R),
            temperatures_T11=self._temperatures(positions, positions_T),
            global_inputs=self._group_inputs(self._global, ordered, chunked=False),
            chunked_inputs=self._group_inputs(self._chunked, ordered, chunked=True),
            sampled_rows_B=self._sampled_rows([row.first + row.work.num_tokens - 1 for row in sampled], len(positions)),
            sampled=tuple(row.work.request_idx for row in sampled),
            single_seats_B=self._upload(
                np.array([row.state.memory_row for row in ordered if row.work.num_tokens == 1], dtype=np.int32)
            ),
            memory_rows_B=self._upload(np.array([row.state.memory_row for row in sampled], dtype=np.int64)),
        )

    def _token_ids(self, rows: Sequence["_Work"], last_tokens_R: Tensor) -> Tensor:
        """Known ids from the host; a token that the last step sampled from the device's memory."""
        known = [row for row in rows if row.end <= len(row.state.ids)]
        remembered = [row for row in rows if row.end > len(row.state.ids)]
        memory_rows = self._upload(np.array([row.state.memory_row for row in remembered], dtype=np.int64))
        if not known and remembered:
            return last_tokens_R.index_select(0, memory_rows)
        ids = [row.state.ids[row.work.start : row.end] if row.end <= len(row.state.ids) else _UNKNOWN for row in rows]
        ids_T = self._upload(_concatenate(ids))
        if remembered:
            targets = self._upload(np.array([row.first for row in remembered], dtype=np.int64))
            ids_T.index_copy_(0, targets, last_tokens_R.index_select(0, memory_rows))
        return ids_T

    def _temperatures(self, positions: Ids, positions_T: Tensor) -> Tensor | None:
        config = self._config
        if not config.temperature_tuning or not len(positions) or positions.max() + 1 < config.floor_scale:
            return None
        return temperatures(positions_T, config.floor_scale, config.attn_scale)

    def _group_inputs(self, builder: Builder | None, rows: Sequence["_Work"], chunked: bool) -> GroupInputs | None:
        if builder is None:
            return None
        pieces = [row.piece(chunked) for row in rows]
        num_singles = sum(row.work.num_tokens == 1 for row in rows)
        return builder.build(pieces[:num_singles], pieces[num_singles:])

    def _sampled_rows(self, rows: list[int], num_tokens: int) -> Tensor | None:
        return None if rows == list(range(num_tokens)) else self._upload(np.array(rows, dtype=np.int64))

    def _upload(self, values: npt.NDArray[Any]) -> Tensor:
        return upload_array(values, self._device)


_UNKNOWN: Ids = np.zeros(1, dtype=np.int64)  # stands for a remembered token until the device puts it in


@dataclass(slots=True)
class _Work:
    """A piece of work with its request; `first` is its first row of the step."""

    work: Work
    state: RequestState
    first: int = 0

    @property
    def end(self) -> int:
        return self.work.start + self.work.num_tokens

    def piece(self, chunked: bool) -> Piece:
        table = self.state.chunked_table if chunked else self.state.global_table
        granted = self.work.chunked_pages if chunked else self.work.global_pages
        return Piece(self.first, self.work.start, self.end, table, len(granted))


def _in_row_order(rows: Sequence[_Work]) -> list[_Work]:
    """Single tokens by falling position, then the others as they came; sets `first`."""
    ordered = sorted(rows, key=lambda row: (1, 0) if row.work.num_tokens > 1 else (0, -row.work.start))
    next_row = 0
    for row in ordered:
        row.first = next_row
        next_row += row.work.num_tokens
    return ordered


def _concatenate(parts: Sequence[Ids]) -> Ids:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
