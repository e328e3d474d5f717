"""Attention of longer pieces over paged keys and values, by FlashInfer where it is installed.

Owns the plan that all layers of a page group share in a step. Knows nothing of requests. FlashInfer compiles its
kernels with nvcc at first use (half a minute) and keeps them under FLASHINFER_WORKSPACE_BASE, or the home directory.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.kernels.heads import Heads

HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends for partial results
_HOPPER = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRun:
    """Consecutive tokens of one request in one chunk, the last of which sees all `num_keys` keys.

    `page_ids_N`: the pages that hold those keys, from the start of the context, which is where a page starts.
    """

    num_queries: int
    num_keys: int
    page_ids_N: NDArray[np.integer[Any]]


def is_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PagedPrefill serves these: otherwise attention is torch's."""
    is_fit = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim in HEAD_DIMS
    return is_fit and _flashinfer() is not None


@cache
def _flashinfer() -> Any | None:
    try:
        return importlib.import_module("flashinfer")
    except ImportError:
        return None


class PagedPrefill:
    """One page group's attention: planned once in a step, then run by every layer of the group."""

    def __init__(self, heads: Heads, page_tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
        self._heads = heads
        self._page_tokens = page_tokens
        self._dtype = dtype
        self._cache_dtype = cache_dtype
        self._wrapper: Any = None
        self._uploaded: torch.cuda.Event | None = None

    def start(self, device: torch.device, workspace: Tensor | None = None) -> None:
        """Takes memory on `device`. Groups whose layers run on one stream may share a `workspace` (uint8)."""
        if workspace is None:
            workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # The Hopper kernels want queries and cache of one dtype.
        is_hopper = torch.cuda.get_device_capability(device)[0] == _HOPPER
        backend = "fa3" if is_hopper and self._dtype == self._cache_dtype else "fa2"
        flashinfer = importlib.import_module("flashinfer")
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout="NHD", backend=backend)
        self._uploaded = torch.cuda.Event()

    def plan(self, runs: Sequence[PrefillRun]) -> None:
        """Lays out `runs`, whose queries will lie one after another; there is at least one.

        Returns at once, unless what the last plan uploads is still to be read: a plan is written where the last one
        was.
        """
        assert self._uploaded is not None, "plan() comes after start()"
        self._uploaded.synchronize()
        num_queries = np.array([run.num_queries for run in runs])
        num_keys = np.array([run.num_keys for run in runs])
        num_pages = -(-num_keys // self._page_tokens)
        page_ids = np.concatenate([run.page_ids_N[:n] for run, n in zip(runs, num_pages.tolist(), strict=True)])
        self._wrapper.plan(
            _int32(np.concatenate(([0], np.cumsum(num_queries)))),
            _int32(np.concatenate(([0], np.cumsum(num_pages)))),
            _int32(page_ids),
            _int32(num_keys - (num_pages - 1) * self._page_tokens),
            self._heads.num_heads,
            self._heads.num_kv_heads,
            self._heads.head_dim,
            self._page_tokens,
            causal=True,
            q_data_type=self._dtype,
            kv_data_type=self._cache_dtype,
            seq_lens=_int32(num_keys),
            max_token_per_sequence=int(num_queries.max()),
        )
        self._uploaded.record()

    def run(self, q_THd: Tensor, pages_PSHd: Tensor) -> Tensor:
        """[T, Hq * head_dim] for the T queries that were planned.

        q_THd: rows may be strided. pages_PSHd: [P, page_tokens, 2 Hkv, head_dim], keys first; the queries' own keys
        and values are among them.
        """
        k_PSHd, v_PSHd = pages_PSHd.split(self._heads.num_kv_heads, dim=2)
        out_THd = torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device)
        self._wrapper.run(q_THd, (k_PSHd, v_PSHd), out=out_THd)
        return out_THd.flatten(1)


def _int32(values: NDArray[np.integer[Any]]) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
