"""Steps that are run before anybody waits: those that somebody's will be like."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from actors.attention import worker
from actors.attention.rehearsal import rehearsed_prompts, rehearsed_rows
from actors.attention.worker import AttentionWorker
from actors.types import Work


def test_prompts_of_a_step_are_no_longer_than_a_request_may_be() -> None:
    assert rehearsed_prompts(100, 40) == [40, 40, 20]
    assert rehearsed_prompts(80, 40) == [40, 40]
    assert rehearsed_prompts(17, 40) == [17]


def test_single_rows_go_by_powers_of_two_up_to_all_seats() -> None:
    assert rehearsed_rows(1) == [1]
    assert rehearsed_rows(8) == [1, 2, 4, 8]
    assert rehearsed_rows(9) == [1, 2, 4, 8, 9]


@pytest.mark.parametrize("kv_cache_bytes", [4 << 20, 60 << 10])
def test_the_largest_steps_are_run_whatever_a_request_may_hold(
    make_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kv_cache_bytes: int
) -> None:
    """Or as much of them as there are pages for; and nothing stays of them."""
    steps: list[tuple[int, int]] = []
    forward = AttentionWorker.forward

    def spy(self: AttentionWorker, work: Sequence[Work]) -> Any:
        steps.append((len(work), sum(piece.num_tokens for piece in work)))
        return forward(self, work)

    monkeypatch.setattr(AttentionWorker, "forward", spy)
    monkeypatch.setattr(worker, "uses_kernels", lambda *_: True)
    case = make_case("maverick")
    model = case.load(max_model_len=40, max_num_batched_tokens=100, max_num_seqs=6, kv_cache_bytes=kv_cache_bytes)
    room = min(model.pools.global_pages, model.pools.chunked_pages) * model.pools.page_tokens
    if kv_cache_bytes == 4 << 20:
        assert room > 100
        assert steps == [(1, 17), (2, 64), (3, 100), (1, 1), (2, 2), (4, 4), (6, 6)]
    else:
        assert room == 20
        assert steps == [(1, 17), (1, 20), (1, 20), (1, 1), (2, 2), (4, 4), (5, 5)]
    assert len(model.attention._requests) == 0
