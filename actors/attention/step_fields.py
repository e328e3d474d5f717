"""What the host writes of a captured step, a few numbers per row, and where its rows lie.

Owns the memory that they are written to and how it reaches the device without a wait. Work of one token comes first, a
row each; then the pieces of prompts, each from a multiple of TILE_ROWS on. Knows nothing of what is computed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.attention.requests import RequestTable
from actors.attention.upload import mark
from actors.kernels.prompt_attention import TILE_ROWS
from actors.kernels.step_inputs import IS_PROMPT, NUM_FIELDS, POSITION, SEAT, TOKEN
from actors.types import Work

Values = np.ndarray[Any, np.dtype[np.int32]]

NOTHING = -1  # no seat, no token from the host, no page
SAMPLED_ROW = IS_PROMPT + 1  # of steps with prompts: rows that are sampled, in the order of the work
BUFFERS = 4  # a step's fields are read from host memory after its launch: as many as steps are in flight, and to spare


class StepFields:
    """int32 [fields, rows] on the device, and on the host as often as steps may be in flight."""

    def __init__(self, num_fields: int, max_rows: int, device: torch.device) -> None:
        shape, is_pinned = (num_fields, max_rows), device.type == "cuda"
        self.packed_FB: Tensor = torch.full(shape, NOTHING, dtype=torch.int32, device=device)
        self.packed_FB[POSITION].zero_()
        self.packed_FB[NUM_FIELDS:].zero_()
        self._on_host = [torch.full(shape, NOTHING, dtype=torch.int32, pin_memory=is_pinned) for _ in range(BUFFERS)]
        self._are_read: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._device = device
        self._turn = 0

    @staticmethod
    def of_singles(max_rows: int, device: torch.device) -> "StepFields":
        return StepFields(NUM_FIELDS, max_rows, device)

    @staticmethod
    def of_prompts(max_rows: int, device: torch.device) -> "StepFields":
        return StepFields(SAMPLED_ROW + 1, max_rows, device)

    def next(self) -> Values:
        """To be written, and then sent. Waits where the device has yet to read what was sent BUFFERS times ago: a step
        that samples nothing may have been launched without a wait for those before it.
        """
        self._turn = (self._turn + 1) % BUFFERS
        is_read = self._are_read[self._turn]
        if is_read is not None and not is_read.query():
            is_read.synchronize()
        return self._on_host[self._turn].numpy()  # type: ignore[no-any-return]

    def send(self) -> None:
        """What was written last, behind what the device has to do."""
        self.packed_FB.copy_(self._on_host[self._turn], non_blocking=True)
        self._are_read[self._turn] = mark(self._device)


def write_singles(fields: Values, work: Sequence[Work], requests: RequestTable, page_tokens: int, size: int) -> None:
    """One row for each piece of work, of one token, with the page that it brings; the rest of `size` is padding. Raises
    ValueError if the work needs tokens or pages that are not there.
    """
    columns, num_rows = [], len(work)
    for item in work:
        state, start = requests[item.request_idx], item.start
        state.check(item)
        state.check_pages(item, page_tokens)
        token = int(state.ids[start]) if start < len(state.ids) else NOTHING
        global_page = item.global_pages[-1] if item.global_pages else NOTHING
        chunked_page = item.chunked_pages[-1] if item.chunked_pages else NOTHING
        columns.append((state.memory_row, start, token, global_page, chunked_page))
    if columns:
        fields[:NUM_FIELDS, :num_rows] = np.array(columns, dtype=np.int32).T
    _pad(fields, slice(num_rows, size))


def write_with_prompts(
    fields: Values, work: Sequence[Work], requests: RequestTable, page_tokens: int, size: int
) -> None:
    """As `write_singles`, with pieces of prompts; tables have their pages already."""
    write_singles(fields, [item for item in work if item.num_tokens == 1], requests, page_tokens, size)
    fields[IS_PROMPT:, :size] = 0
    last_rows = {}
    for item, first in first_rows(work):
        last_rows[item.request_idx] = first + item.num_tokens - 1
        if item.num_tokens == 1:
            continue
        state, rows = requests[item.request_idx], slice(first, first + item.num_tokens)
        state.check(item)
        state.check_pages(item, page_tokens)
        fields[SEAT, rows] = state.memory_row
        fields[POSITION, rows] = np.arange(item.start, item.start + item.num_tokens)
        fields[TOKEN, rows] = state.ids[item.start : item.start + item.num_tokens]
        fields[IS_PROMPT, rows] = 1
    sampled = [last_rows[item.request_idx] for item in work if item.samples]
    fields[SAMPLED_ROW, : len(sampled)] = sampled


def first_rows(work: Sequence[Work]) -> Iterator[tuple[Work, int]]:
    """Where the rows of each piece begin in a step with prompts."""
    row = 0
    for item in work:
        if item.num_tokens == 1:
            yield item, row
            row += 1
    for item in work:
        if item.num_tokens > 1:
            row = -(-row // TILE_ROWS) * TILE_ROWS
            yield item, row
            row += item.num_tokens


def num_rows(work: Sequence[Work]) -> int:
    """Of a step with prompts."""
    return max((first + item.num_tokens for item, first in first_rows(work)), default=0)


def _pad(fields: Values, rows: slice) -> None:
    fields[:NUM_FIELDS, rows] = NOTHING
    fields[POSITION, rows] = 0
