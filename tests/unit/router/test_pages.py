"""Pools never have two owners for a page; page arithmetic equals a count by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.router.pages import PageGeometry, PagePool, RankPages


def test_a_pool_grants_every_page_once_and_takes_it_back() -> None:
    pool = PagePool(5)
    first, rest = pool.allocate(2), pool.allocate(3)
    assert sorted(first + rest) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 5)
    pool.free(first)
    assert sorted(pool.allocate(2)) == sorted(first)


def test_a_pool_refuses_what_would_make_two_owners() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    with pytest.raises(ValueError, match="1 pages asked for, 0 are free"):
        pool.allocate(1)
    pool.free(pages[:1])
    with pytest.raises(ValueError, match="is free already"):
        pool.free(pages)


@given(operations=st.lists(st.integers(-4, 4)))
def test_a_pool_conserves_pages(operations: list[int]) -> None:
    pool, held = PagePool(8), []
    for size in operations:
        if size >= 0:
            held += pool.allocate(min(size, pool.num_free))
        else:
            pool.free(held[:-size])
            held = held[-size:]
        assert len(set(held)) == len(held) == pool.num_used == 8 - pool.num_free


@given(page=st.integers(1, 6), chunk=st.integers(1, 20), position=st.integers(0, 80))
def test_geometry_equals_a_count_by_hand(page: int, chunk: int, position: int) -> None:
    geometry = PageGeometry(page_tokens=page, chunk_tokens=chunk)
    assert geometry.pages_for(position) == len({p // page for p in range(position)})
    read = [p for p in range(position + 1) if p // chunk == position // chunk]
    assert geometry.first_live_page(position) == read[0] // page
    turns = (p for p in range(position, position + chunk + page) if p % page == 0 or (p + 1) % chunk == 0)
    assert geometry.next_turn(position) == next(turns)


@given(page=st.integers(1, 6), chunk=st.integers(1, 20), num_tokens=st.integers(1, 60))
def test_live_pages_are_what_the_worst_row_reads(page: int, chunk: int, num_tokens: int) -> None:
    geometry = PageGeometry(page_tokens=page, chunk_tokens=chunk)
    worst = max(p // page - geometry.first_live_page(p) + 1 for p in range(num_tokens))
    bound = geometry.live_pages_for(num_tokens)
    assert worst <= bound
    assert bound == worst or chunk % page  # straddling pages are bounded, not counted


def test_the_longest_request_of_a_rank() -> None:
    both = PageGeometry(page_tokens=4, chunk_tokens=8)
    assert both.max_request_tokens(RankPages(10, 2), 1000) == 41  # a chunk fits: global pages decide
    assert both.max_request_tokens(RankPages(10, 1), 1000) == 5  # no chunk fits: its first page does
    assert both.max_request_tokens(RankPages(10, 2), 12) == 12
    assert PageGeometry(page_tokens=4).max_request_tokens(RankPages(10, 0), 1000) == 41
    chunked_only = PageGeometry(page_tokens=4, chunk_tokens=8, has_global=False)
    assert chunked_only.max_request_tokens(RankPages(0, 2), 1000) == 1000


def test_geometry_out_of_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match="out of bounds"):
        PageGeometry(page_tokens=0)
    with pytest.raises(ValueError, match="no page group"):
        PageGeometry(page_tokens=4, has_global=False)
