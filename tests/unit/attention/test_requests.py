"""The rank's memory of its requests."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.attention.requests import PageTable, RequestTable
from actors.types import Admission, SamplingParams, Work

CPU = torch.device("cpu")


def _admission(request_idx: int, prompt: int = 3, outputs: int = 2) -> Admission:
    return Admission(
        request_idx=request_idx,
        prompt_ids=tuple(range(prompt)),
        output_ids=tuple(range(100, 100 + outputs)),
        sampling=SamplingParams(max_tokens=9),
    )


def _work(start: int, num_tokens: int) -> Work:
    return Work(request_idx=7, start=start, num_tokens=num_tokens, samples=False)


@given(st.lists(st.lists(st.integers(0, 1000), max_size=40), max_size=20))
def test_page_table_is_what_was_appended(grants: list[list[int]]) -> None:
    table = PageTable()
    for pages in grants:
        table.append(pages)
    assert table.pages.tolist() == [page for pages in grants for page in pages]


def test_outputs_follow_the_prompt() -> None:
    table = RequestTable(CPU)
    table.admit(_admission(7))
    assert table[7].ids.tolist() == [0, 1, 2, 100, 101]


def test_tokens_not_yet_sampled_cannot_be_computed() -> None:
    table = RequestTable(CPU)
    table.admit(_admission(7))
    table[7].check(_work(0, 5))
    with pytest.raises(ValueError, match="request 7"):
        table[7].check(_work(4, 2))
    with pytest.raises(ValueError, match="request 7"):
        table[7].check(_work(0, 0))


def test_only_the_last_sampled_token_is_remembered() -> None:
    table = RequestTable(CPU)
    table.admit(_admission(7))
    row = torch.tensor([table[7].memory_row])
    for token in (40, 41):
        table.remember([7], row, torch.tensor([token]))
    assert table.last_tokens_R[row].tolist() == [41]
    table[7].check(_work(6, 1))
    for work in (_work(5, 1), _work(5, 2)):
        with pytest.raises(ValueError, match="only the last"):
            table[7].check(work)


def test_an_index_names_one_request_at_a_time() -> None:
    table = RequestTable(CPU)
    table.admit(_admission(7))
    with pytest.raises(ValueError, match="already"):
        table.admit(_admission(7))
    table.release(7)
    table.admit(_admission(7, prompt=1))
    assert len(table[7].ids) == 3


@given(st.integers(0, 1 << 30))
def test_no_two_requests_share_a_row_of_memory(seed: int) -> None:
    draw, table, live = random.Random(seed), RequestTable(CPU), set()
    for request_idx in range(120):
        if live and draw.random() < 0.4:
            table.release(live.pop())
        table.admit(_admission(request_idx))
        live.add(request_idx)
        rows = {table[idx].memory_row for idx in live}
        assert len(rows) == len(live) == len(table)
        assert max(rows) < len(table.last_tokens_R) <= 2 * max(16, len(live) * 2)
