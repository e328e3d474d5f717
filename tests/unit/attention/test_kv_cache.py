"""How the page pools divide a budget."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.attention.kv_cache import KvCache, PagePools, fit_page_tokens, page_bytes, plan_pages
from actors.checkpoint.shapes import SHAPES, shape_config
from actors.errors import ConfigError

MAVERICK = shape_config(SHAPES["maverick"])
TINY = shape_config(SHAPES["tiny"])  # 2 global and 6 chunked layers, 2 kv heads of 16, chunk 32
GIB = 1 << 30


def test_bytes_per_token_of_maverick() -> None:
    """48 KiB per token in 12 global layers, 144 KiB in 36 chunked ones, in bf16."""
    assert page_bytes(MAVERICK, len(MAVERICK.global_layers), 1, 2) == 48 << 10
    assert page_bytes(MAVERICK, len(MAVERICK.chunked_layers), 1, 2) == 144 << 10


def test_expected_request_fills_both_pools_alike() -> None:
    """32 K tokens hold 1.5 GiB of global and 1.125 GiB of chunked pages: 16 such requests fit into 42 GiB exactly."""
    pools = plan_pages(MAVERICK, 16, 42 * GIB, 131072, 2)
    assert pools == PagePools(page_tokens=16, global_pages=16 * 32768 // 16, chunked_pages=16 * 8192 // 16)


def test_short_contexts_share_evenly() -> None:
    pools = plan_pages(MAVERICK, 16, 10 * GIB, 4096, 2)
    assert abs(pools.global_pages - pools.chunked_pages) <= 1


def test_one_request_of_the_longest_context_fits_if_it_can() -> None:
    pools = plan_pages(MAVERICK, 16, 50 * GIB, 1 << 20, 2)  # 1 M tokens take 49.1 GiB
    assert pools.global_pages == (1 << 20) // 16
    assert pools.chunked_pages >= 8192 // 16


@given(
    budget_bytes=st.integers(1 << 14, 1 << 24),
    max_model_len=st.integers(1, 5000),
    page_tokens=st.sampled_from([1, 2, 4, 8, 16, 32]),
)
def test_pools_fit_the_budget_and_waste_less_than_two_pages(
    budget_bytes: int, max_model_len: int, page_tokens: int
) -> None:
    global_bytes, chunked_bytes = page_bytes(TINY, 2, page_tokens, 4), page_bytes(TINY, 6, page_tokens, 4)
    if budget_bytes < global_bytes + chunked_bytes:
        with pytest.raises(ConfigError, match="kv_cache_bytes"):
            plan_pages(TINY, page_tokens, budget_bytes, max_model_len, 4)
        return
    pools = plan_pages(TINY, page_tokens, budget_bytes, max_model_len, 4)
    used_bytes = pools.global_pages * global_bytes + pools.chunked_pages * chunked_bytes
    assert pools.global_pages >= 1
    assert pools.chunked_pages >= 1
    assert budget_bytes - chunked_bytes < used_bytes <= budget_bytes


def test_pages_must_divide_chunks() -> None:
    with pytest.raises(ConfigError, match="page_tokens"):
        plan_pages(TINY, 24, 1 << 20, 100, 4)
    assert fit_page_tokens(TINY, 24) == 8
    assert fit_page_tokens(TINY, 64) == 32
    assert fit_page_tokens(replace(TINY, chunk_tokens=0), 24) == 24


def test_models_with_one_group_use_the_whole_budget() -> None:
    unchunked = replace(TINY, chunk_tokens=0)
    assert plan_pages(unchunked, 4, 1 << 20, 100, 4) == PagePools(page_tokens=4, global_pages=128, chunked_pages=0)
    all_rotate = replace(TINY, rope_layers=tuple(range(8)))
    assert plan_pages(all_rotate, 4, 1 << 20, 100, 4) == PagePools(page_tokens=4, global_pages=0, chunked_pages=128)


def test_cache_takes_what_was_planned() -> None:
    pools = plan_pages(TINY, 8, 1 << 20, 500, 2)
    cache = KvCache(TINY, pools, torch.bfloat16, torch.device("cpu"))
    assert cache.num_bytes <= 1 << 20
    assert [layer.pages_PSHd.shape[0] for layer in cache.layers] == [
        pools.global_pages if i in TINY.global_layers else pools.chunked_pages for i in range(8)
    ]
    cache.layers[3].tokens_NHd[8 * 2 + 5] = 1  # page 2, offset 5 of the first global layer
    assert cache.global_LPSHd[0, 2, 5].eq(1).all()
    assert cache.global_LPSHd.count_nonzero() == cache.layers[3].pages_PSHd[0, 0].numel()
