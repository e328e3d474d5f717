"""KV pages as numbers: pools of them, and how positions map to them.

Owns which pages are free and the arithmetic of the two page groups (global layers keep every page, chunked layers only
those of the current chunk). Knows nothing of requests, steps or tensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankPages:
    """KV room of one attention rank in pages, as its Loaded message states it. A group without layers is not read."""

    global_pages: int
    chunked_pages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGeometry:
    """Positions to pages. Page j of either group covers positions [j * page_tokens, (j + 1) * page_tokens).

    `chunk_tokens` 0 means that no layer is chunked. It need not be a multiple of `page_tokens`: a page that straddles a
    boundary dies with the later chunk. `has_global` False means that all layers are chunked.
    """

    page_tokens: int
    chunk_tokens: int = 0
    has_global: bool = True

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or self.chunk_tokens < 0:
            raise ValueError(f"page_tokens {self.page_tokens} or chunk_tokens {self.chunk_tokens} is out of bounds")
        if not self.chunk_tokens and not self.has_global:
            raise ValueError("there is no page group")

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold positions [0, num_tokens)."""
        return -(-num_tokens // self.page_tokens)

    def live_pages_for(self, num_tokens: int) -> int:
        """Most pages of the chunked group that one request ever needs at once to compute positions [0, num_tokens)."""
        if not self.chunk_tokens:
            return 0
        aligned = self.chunk_tokens % self.page_tokens == 0
        span_tokens = self.chunk_tokens if aligned else self.chunk_tokens + self.page_tokens - 1
        return min(self.pages_for(num_tokens), self.pages_for(span_tokens))

    def first_live_page(self, position: int) -> int:
        """First page of the chunked group that a row at `position` or later reads."""
        return position // self.chunk_tokens * self.chunk_tokens // self.page_tokens

    def next_turn(self, position: int) -> int:
        """Smallest p >= `position` that begins a page or ends a chunk: only there does a decode touch page tables."""
        page_start = self.pages_for(position) * self.page_tokens
        if not self.chunk_tokens:
            return page_start
        return min(page_start, (position // self.chunk_tokens + 1) * self.chunk_tokens - 1)

    def max_request_tokens(self, pages: RankPages, max_model_len: int) -> int:
        """Longest prompt + output, at most `max_model_len`, that a rank with these pages can finish.

        The last token's KV is never computed, so it needs no page.
        """
        longest = max_model_len
        if self.has_global:
            longest = min(longest, pages.global_pages * self.page_tokens + 1)
        if self.chunk_tokens and pages.chunked_pages < self.live_pages_for(longest - 1):
            longest = pages.chunked_pages * self.page_tokens + 1
        return longest


class PagePool:
    """The pages of one group on one rank, numbered from 0. The page freed last is granted first."""

    __slots__ = ("_free", "_is_free", "num_pages")

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"a pool cannot have {num_pages} pages")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\x01") * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def allocate(self, num_pages: int) -> list[int]:
        """Takes pages out of the pool. Raises ValueError where fewer are free: the caller must have looked."""
        if not 0 <= num_pages <= len(self._free):
            raise ValueError(f"{num_pages} pages asked for, {len(self._free)} are free")
        cut = len(self._free) - num_pages
        taken = self._free[cut:]
        del self._free[cut:]
        taken.reverse()
        for page in taken:
            self._is_free[page] = 0
        return taken

    def free(self, pages: Iterable[int]) -> None:
        """Gives pages back. Raises ValueError on a page that is free already (two owners would follow)."""
        for page in pages:
            if self._is_free[page]:
                raise ValueError(f"page {page} is free already")
            self._is_free[page] = 1
            self._free.append(page)
