"""Steps as a GPU lays them out, computed by the kernels' references, against transformers."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from actors.attention import mixed, worker
from actors.attention.mixed import PromptBuilder
from actors.attention.page_groups import Piece
from actors.attention.requests import PageTable
from actors.kernels.prefill_attention import run_attention

TOLERANCE = 1e-3
PAGE, FRESH = 4, 6


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "uses_kernels", lambda *_: True)
    monkeypatch.setattr(mixed, "FRESH_TOKENS", FRESH)  # prompts here are short


@pytest.mark.parametrize("variant", ["maverick", "scout"])
@pytest.mark.parametrize("num_tokens", [1, 6, 12, 15, 16, 17, 33, 70])
def test_prompt_at_once(make_case: Callable, load_once: Callable, variant: str, num_tokens: int) -> None:
    case = make_case(variant)
    ours = load_once(variant).logits(case.prompts[0][:num_tokens])
    assert (ours - case.logits[0][:num_tokens]).abs().max() < TOLERANCE


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("variant", ["maverick", "scout"])
def test_mixed_batches_over_poisoned_pages(
    make_case: Callable, load_once: Callable, poisoning_router: Callable, variant: str, seed: int
) -> None:
    """Requests come and go; each step mixes pieces of every size; every page that is freed is filled with NaN."""
    case, draw = make_case(variant), random.Random(seed)
    router = poisoning_router(case, load_once(variant, kv_cache_bytes=1 << 20), seed)
    arrivals = [(draw.randrange(3), draw.randint(1, 70)) for _ in range(8)]
    while arrivals or router.running:
        if arrivals and (not router.running or draw.random() < 0.4):
            router.admit(*arrivals.pop())
        chosen = draw.sample(sorted(router.running), draw.randint(1, len(router.running)))
        left = {i: router.running[i].num_tokens - router.running[i].done for i in chosen}
        assert router.step([(i, min(left[i], draw.choice([1, 1, 2, 7, 12, 30]))) for i in chosen]) < TOLERANCE


def test_fp8_keys_and_values_do_not_depend_on_the_split(make_case: Callable) -> None:
    """A run that reads its own keys sees them as the cache rounds them."""
    case = make_case("maverick")
    model = case.load(kv_cache_dtype="fp8")
    at_once = model.logits(case.prompts[0])
    split = model.logits(case.prompts[0], [1] * 40 + [13, 17])
    assert (split - at_once).abs().median() < TOLERANCE


def runs_of(chunk_tokens: int, *pieces: tuple[int, int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Rows of fresh runs, and sizes of others, of longer pieces [start, end) behind three rows of one token."""
    row, longer = 3, []
    for start, end in pieces:
        table = PageTable()
        table.append(range(-(-end // PAGE)))
        longer.append(Piece(row, start, end, table, 0))
        row += end - start
    table = PageTable()
    table.append([0])
    singles = [Piece(i, i, i + 1, table, 0) for i in range(3)]
    prompts = PromptBuilder(PAGE, chunk_tokens, torch.device("cpu")).build(singles, longer).prompts
    assert prompts is not None
    fresh = [(runs.rows.start, runs.rows.stop) for runs in prompts.fresh]
    assert all((runs.rows.stop - runs.rows.start) % (runs.num_runs * FRESH) == 0 for runs in prompts.fresh)
    if prompts.cached is None:
        return fresh, []
    sizes = list(prompts.cached.runs.sizes)
    seen_T = torch.zeros(row, dtype=torch.int64)
    seen_T[prompts.cached.rows] += 1
    for low, high in fresh:
        seen_T[low:high] += 1
    assert seen_T.tolist() == [0, 0, 0] + [1] * (row - 3)
    assert sum(num_queries for num_queries, _ in sizes) + sum(high - low for low, high in fresh) == row - 3
    assert len(prompts.cached.key_slots_N) == sum(num_keys for _, num_keys in sizes)
    return fresh, sizes


def test_only_whole_multiples_that_begin_their_context_are_fresh() -> None:
    assert runs_of(0, (0, 12)) == ([(3, 15)], [])
    assert runs_of(0, (0, 5), (0, 14), (6, 18)) == ([(8, 20)], [(5, 5), (2, 14), (12, 18)])
    assert runs_of(16, (0, 33)) == ([(3, 15), (19, 31)], [(4, 16), (4, 16), (1, 1)])
    assert runs_of(16, (10, 24)) == ([(9, 15)], [(6, 16), (2, 8)])


def test_equal_runs_that_lie_together_are_computed_at_once() -> None:
    """In powers of two, and not across a run of another length, or one of whose rows something is left."""
    table = PageTable()
    table.append(range(8))
    ends, row, longer = [12] * 7 + [6, 6, 12, 13, 12], 3, []
    for end in ends:
        longer.append(Piece(row, 0, end, table, 0))
        row += end
    prompts = PromptBuilder(PAGE, 0, torch.device("cpu")).build([], longer).prompts
    assert prompts is not None
    sizes = [(runs.rows.stop - runs.rows.start, runs.num_runs) for runs in prompts.fresh]
    assert sizes == [(48, 4), (24, 2), (12, 1), (12, 2), (24, 2), (12, 1)]
    assert [runs.rows.start for runs in prompts.fresh] == [3, 51, 75, 87, 99, 124]


def test_many_runs_at_once_are_as_one_by_one() -> None:
    q_QHd, k_NHd, v_NHd = torch.randn(36, 8, 16, generator=torch.Generator().manual_seed(1)).split((4, 2, 2), dim=1)
    runs = zip(q_QHd.split(12), k_NHd.split(12), v_NHd.split(12), strict=True)
    expected = torch.cat([run_attention(*run) for run in runs])
    torch.testing.assert_close(run_attention(q_QHd, k_NHd, v_NHd, 3), expected, rtol=0, atol=1e-6)


def test_ends_of_runs() -> None:
    table = PageTable()
    table.append([5, 2, 7])
    longer = [Piece(0, 3, 6, table, 0), Piece(3, 4, 9, table, 0)]
    prompts = PromptBuilder(PAGE, 0, torch.device("cpu")).build([], longer).prompts
    assert prompts is not None and prompts.cached is not None and prompts.cached.rows == slice(0, 8)
    runs = prompts.cached.runs
    assert runs.query_ends_R1.tolist() == [0, 3, 8]
    assert runs.key_ends_R1.tolist() == [0, 6, 15]
    assert runs.key_ends_R1.dtype == torch.int32 and runs.key_ends_R1.is_contiguous()
    assert np.array_equal(prompts.cached.key_slots_N, [20, 21, 22, 23, 8, 9, 20, 21, 22, 23, 8, 9, 10, 11, 28])
