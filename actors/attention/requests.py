"""What an attention rank remembers of its requests between steps.

Owns each request's known token ids, its page tables and its place in the device's memory of last sampled tokens.
Knows nothing of how a step is laid out (`batch.py`), nor of sampling parameters (`sampler.py`).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.types import Admission, Work

Ids = npt.NDArray[np.int64]


class PageTable:
    """Page ids by page number, growing at the end. Page j holds positions [j * page_tokens, (j + 1) * page_tokens)."""

    __slots__ = ("_pages", "num_pages")

    def __init__(self) -> None:
        self._pages: Ids = np.empty(16, dtype=np.int64)
        self.num_pages = 0

    def append(self, pages: Sequence[int]) -> None:
        needed = self.num_pages + len(pages)
        if needed > len(self._pages):
            grown: Ids = np.empty(max(needed, 2 * len(self._pages)), dtype=np.int64)
            grown[: self.num_pages] = self._pages[: self.num_pages]
            self._pages = grown
        self._pages[self.num_pages : needed] = pages
        self.num_pages = needed

    @property
    def pages(self) -> Ids:
        """The granted pages; a view that the next append may detach."""
        return self._pages[: self.num_pages]


class RequestState:
    """One admitted request. `num_tokens` counts its known tokens and those sampled here since."""

    __slots__ = ("chunked_table", "global_table", "ids", "memory_row", "num_tokens", "request_idx")

    def __init__(self, admission: Admission, memory_row: int) -> None:
        self.request_idx = admission.request_idx
        self.ids: Ids = np.array(admission.prompt_ids + admission.output_ids, dtype=np.int64)
        self.num_tokens = len(self.ids)
        self.memory_row = memory_row
        self.global_table = PageTable()
        self.chunked_table = PageTable()

    def check(self, work: Work) -> None:
        """Raises ValueError where `work` asks for tokens that this rank cannot know."""
        end = work.start + work.num_tokens
        if work.start < 0 or work.num_tokens < 1 or end > self.num_tokens:
            raise ValueError(
                f"request {self.request_idx}: tokens [{work.start}, {end}) of {self.num_tokens} cannot be computed"
            )
        if end > len(self.ids) and (work.num_tokens != 1 or end != self.num_tokens):
            raise ValueError(f"request {self.request_idx}: only the last sampled token is remembered, not {work.start}")

    def check_pages(self, work: Work, page_tokens: int) -> None:
        """Raises ValueError where pages for `work` were not granted in both groups."""
        end, num_pages = work.start + work.num_tokens, max(self.global_table.num_pages, self.chunked_table.num_pages)
        if num_pages * page_tokens < end:
            raise ValueError(f"request {self.request_idx}: {num_pages} pages were granted for {end} tokens")


class RequestTable:
    """All requests of a rank by index, and the last sampled token of each on the device.

    That memory has room for `num_rows` from the beginning, and does not move while no more are needed.
    """

    def __init__(self, device: torch.device, num_rows: int = 0) -> None:
        self._device = device
        self._states: dict[int, RequestState] = {}
        self._free_rows: list[int] = list(range(num_rows - 1, -1, -1))
        self.last_tokens_R: Tensor = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self._states)

    def clear(self) -> None:
        """Forgets all requests. The memory of tokens stays where it is."""
        self._states.clear()
        self._free_rows = list(range(len(self.last_tokens_R) - 1, -1, -1))

    def __getitem__(self, request_idx: int) -> RequestState:
        return self._states[request_idx]

    def admit(self, admission: Admission) -> None:
        if admission.request_idx in self._states:
            raise ValueError(f"request {admission.request_idx} is admitted already")
        if not self._free_rows:
            self._grow()
        self._states[admission.request_idx] = RequestState(admission, self._free_rows.pop())

    def grant(self, work: Work) -> None:
        """Appends the pages that a piece of work brings to its request's tables."""
        state = self._states[work.request_idx]
        state.global_table.append(work.global_pages)
        state.chunked_table.append(work.chunked_pages)

    def release(self, request_idx: int) -> None:
        self._free_rows.append(self._states.pop(request_idx).memory_row)

    def remember(self, request_idxs: Sequence[int], memory_rows_B: Tensor, token_ids_B: Tensor) -> None:
        """Keeps the step's sampled tokens for the next one, on the device: the host need not have seen them."""
        for request_idx in request_idxs:
            self._states[request_idx].num_tokens += 1
        self.last_tokens_R.index_copy_(0, memory_rows_B, token_ids_B)

    def _grow(self) -> None:
        held = len(self.last_tokens_R)
        added = max(16, held)
        self._free_rows = list(range(held + added - 1, held - 1, -1))
        self.last_tokens_R = torch.cat([self.last_tokens_R, self.last_tokens_R.new_zeros(added)])
