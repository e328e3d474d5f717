"""Paged memory for keys and values, in two groups of layers.

Owns the size of the two page pools and their tensors. Global layers keep every token; chunked layers keep the current
chunk, so their pages come back as the chunk turns. Who owns which page is the router's business: a rank reads and
writes the pages that plans name.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig
from actors.config import KvDType
from actors.errors import ConfigError

FP8_MAX = 448.0  # largest finite float8_e4m3fn
EXPECTED_CHUNKS = 4  # pools are balanced for requests of this many chunks, or of max_model_len if that is less


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePools:
    """Page size in tokens, and pages of each group that a rank holds. A group without layers has none."""

    page_tokens: int
    global_pages: int
    chunked_pages: int


def fit_page_tokens(config: ModelConfig, wanted: int) -> int:
    """The largest page size, in tokens, that divides both `wanted` and the model's chunk."""
    return math.gcd(wanted, config.chunk_tokens) if config.chunk_tokens else wanted


def page_bytes(config: ModelConfig, num_layers: int, page_tokens: int, dtype_bytes: int) -> int:
    """Bytes of one page of a group of `num_layers` layers: keys and values of all of them."""
    return num_layers * page_tokens * 2 * config.num_kv_heads * config.head_dim * dtype_bytes


def plan_pages(
    config: ModelConfig, page_tokens: int, budget_bytes: int, max_model_len: int, dtype_bytes: int
) -> PagePools:
    """Divides `budget_bytes` between the groups in the ratio in which an expected request uses them.

    The expected request has `EXPECTED_CHUNKS` chunks (shorter ones fill the chunked pool first, longer ones the
    global pool), but one request of `max_model_len` tokens fits if the budget allows it at all. Raises ConfigError if
    pages do not divide chunks, or if the budget holds no page.
    """
    if config.chunk_tokens and config.chunk_tokens % page_tokens:
        raise ConfigError("page_tokens", f"{page_tokens} does not divide the model's chunk of {config.chunk_tokens}")
    global_bytes = page_bytes(config, len(config.global_layers), page_tokens, dtype_bytes)
    chunked_bytes = page_bytes(config, len(config.chunked_layers), page_tokens, dtype_bytes)
    if budget_bytes < global_bytes + chunked_bytes:
        raise ConfigError("kv_cache_bytes", f"{budget_bytes} bytes hold no page of each group")
    if not chunked_bytes:
        return PagePools(page_tokens=page_tokens, global_pages=budget_bytes // global_bytes, chunked_pages=0)
    if not global_bytes:
        return PagePools(page_tokens=page_tokens, global_pages=0, chunked_pages=budget_bytes // chunked_bytes)

    expected_tokens = min(max_model_len, EXPECTED_CHUNKS * config.chunk_tokens)
    requests = budget_bytes / _request_bytes(config, page_tokens, expected_tokens, global_bytes, chunked_bytes)
    global_pages = max(1, int(requests * _num_pages(expected_tokens, page_tokens)))
    longest_pages = _num_pages(max_model_len, page_tokens)
    if _request_bytes(config, page_tokens, max_model_len, global_bytes, chunked_bytes) <= budget_bytes:
        global_pages = max(global_pages, longest_pages)
    global_pages = min(global_pages, (budget_bytes - chunked_bytes) // global_bytes)
    chunked_pages = (budget_bytes - global_pages * global_bytes) // chunked_bytes
    return PagePools(page_tokens=page_tokens, global_pages=global_pages, chunked_pages=chunked_pages)


def _num_pages(num_tokens: int, page_tokens: int) -> int:
    return -(-num_tokens // page_tokens)


def _request_bytes(
    config: ModelConfig, page_tokens: int, num_tokens: int, global_bytes: int, chunked_bytes: int
) -> int:
    """Bytes of the pages that a request of `num_tokens` tokens holds at its end, with a full chunk live."""
    live_tokens = min(num_tokens, config.chunk_tokens)
    return _num_pages(num_tokens, page_tokens) * global_bytes + _num_pages(live_tokens, page_tokens) * chunked_bytes


def cache_dtype(dtype: torch.dtype, name: KvDType) -> torch.dtype:
    """What keys and values are kept in, under `kv_cache_dtype`."""
    return torch.float8_e4m3fn if name == "fp8" else dtype


def as_cached(kv_THd: Tensor, dtype: torch.dtype) -> Tensor:
    """What reading gives for what is written: rounded to fp8 (saturated, scale 1) and back, where that is `dtype`."""
    if dtype != torch.float8_e4m3fn:
        return kv_THd
    return kv_THd.clamp(-FP8_MAX, FP8_MAX).to(dtype).to(kv_THd.dtype)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's pages. Keys and values of a token lie side by side, so that one copy writes or gathers both.

    `pages_PSHd`: [pages, page_tokens, 2 * Hkv, head_dim], keys in the first Hkv heads. `flat_PN` and `tokens_NHd`
    are views of the same memory, by page and by token; `flat_PN` as integers where it is fp8, which cannot be gathered.
    """

    pages_PSHd: Tensor
    flat_PN: Tensor
    tokens_NHd: Tensor

    @staticmethod
    def over(pages_PSHd: Tensor) -> "LayerCache":
        return LayerCache(pages_PSHd, as_integers(pages_PSHd).flatten(1), pages_PSHd.flatten(0, 1))

    def write(self, slots_T: Tensor, kv_THd: Tensor) -> None:
        """Puts keys and values, which `as_cached` has rounded, at page * page_tokens + offset."""
        as_integers(self.tokens_NHd).index_copy_(0, slots_T, as_integers(kv_THd.to(self.tokens_NHd.dtype)))

    def read(self, page_ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, page_tokens, 2 * Hkv, head_dim]: a copy of pages."""
        pages_NSHd = self.flat_PN.index_select(0, page_ids_N).view(-1, *self.pages_PSHd.shape[1:])
        return pages_NSHd.view(self.pages_PSHd.dtype).to(dtype)

    def read_tokens(self, slots_N: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, 2 * Hkv, head_dim]: a copy of tokens."""
        kv_NHd = as_integers(self.tokens_NHd).index_select(0, slots_N)
        return kv_NHd.view(self.tokens_NHd.dtype).to(dtype)


def as_integers(values: Tensor) -> Tensor:
    """fp8 as the bytes that it is, for what torch cannot do with fp8; anything else as it is."""
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


class KvCache:
    """The pages of both groups, and each layer's view of its group."""

    def __init__(self, config: ModelConfig, pools: PagePools, dtype: torch.dtype, device: torch.device) -> None:
        self.pools = pools
        heads = 2 * config.num_kv_heads
        self.global_LPSHd = torch.zeros(
            len(config.global_layers), pools.global_pages, pools.page_tokens, heads, config.head_dim,
            dtype=dtype, device=device,
        )  # fmt: skip
        self.chunked_LPSHd = torch.zeros(
            len(config.chunked_layers), pools.chunked_pages, pools.page_tokens, heads, config.head_dim,
            dtype=dtype, device=device,
        )  # fmt: skip
        views = dict(zip(config.global_layers, self.global_LPSHd, strict=True))
        views |= dict(zip(config.chunked_layers, self.chunked_LPSHd, strict=True))
        self.layers = tuple(LayerCache.over(views[layer]) for layer in range(config.num_layers))

    @property
    def num_bytes(self) -> int:
        return self.global_LPSHd.nbytes + self.chunked_LPSHd.nbytes
