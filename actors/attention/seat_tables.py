"""The page tables of all requests on the device, by seat.

Owns their place and their growth. Which pages are whose, the plans say; the host keeps tables of its own
(`requests.py`) for what it lays out itself.
"""

from collections.abc import Sequence

import torch

from actors.attention.kv_cache import KvCache
from actors.attention.requests import RequestTable
from actors.checkpoint.config import ModelConfig
from actors.kernels.step_inputs import PageTable
from actors.types import Work


class SeatTables:
    """Page tables of every seat on the device, for both groups. A chunked table holds one chunk and is a ring."""

    def __init__(self, config: ModelConfig, cache: KvCache, num_seats: int, max_model_len: int) -> None:
        pools, device = cache.pools, cache.global_LPSHd.device
        self.page_tokens = pools.page_tokens
        longest = min(-(-max_model_len // pools.page_tokens), pools.global_pages) if config.global_layers else 0
        chunk = config.chunk_tokens // pools.page_tokens if config.chunked_layers else 0
        self.global_table = self._make(num_seats, longest, pools.page_tokens, device)
        self.chunked_table = self._make(num_seats, chunk, pools.page_tokens, device)

    @staticmethod
    def _make(num_seats: int, width: int, page_tokens: int, device: torch.device) -> PageTable | None:
        if not width:
            return None
        pages_SW = torch.zeros(num_seats, width, dtype=torch.int32, device=device)
        return PageTable(pages_SW=pages_SW, page_tokens=page_tokens)

    def grant(self, work: Sequence[Work], requests: RequestTable) -> None:
        """Enters the pages that work brings, which the requests' own tables have already."""
        rows = [(requests[item.request_idx], item) for item in work]
        _enter(self.global_table, [(s.memory_row, s.global_table.num_pages, w.global_pages) for s, w in rows])
        _enter(self.chunked_table, [(s.memory_row, s.chunked_table.num_pages, w.chunked_pages) for s, w in rows])


def _enter(table: PageTable | None, grants: Sequence[tuple[int, int, Sequence[int]]]) -> None:
    """Each grant is a seat, its number of pages now, and the last of them."""
    if table is None:
        return
    width = table.pages_SW.shape[1]
    places: list[int] = []
    pages: list[int] = []
    for seat, num_pages, granted in grants:
        kept = granted[-width:]
        pages += kept
        places += [seat * width + number % width for number in range(num_pages - len(kept), num_pages)]
    if pages:
        both_2N = torch.tensor([places, pages], dtype=torch.int64, pin_memory=table.pages_SW.is_cuda)
        places_N, pages_N = both_2N.to(table.pages_SW.device, non_blocking=True)
        table.pages_SW.view(-1).index_copy_(0, places_N, pages_N.int())
