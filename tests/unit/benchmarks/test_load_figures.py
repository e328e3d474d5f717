"""What counts in a steady window and how; what streams do with answers, failures and the window's end."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from benchmarks import clients
from benchmarks.load_figures import Answer, Figures, Level, Window, figures, percentile_ms, token_latencies_s
from benchmarks.trace import Trace
from benchmarks.workload import EndlessItems, Item

WINDOW = Window(begin_s=10.0, end_s=20.0)
ITEMS = EndlessItems(num_streams=2, prompt_tokens=(3, 5), output_tokens=(8, 8), vocab=50)
LEVEL = Level(num_streams=2, items=ITEMS, window=WINDOW)


def answer(number: int, sent_s: float, token_s: Sequence[float], *, is_whole: bool = True, problem: str = "") -> Answer:
    return Answer(number, Trace(sent_s, list(token_s), [0] * len(token_s), problem), is_whole)


def figures_of(*answers: Answer) -> Figures:
    return figures("gRPC", LEVEL, answers)


def test_percentiles_lie_between_the_two_nearest_values() -> None:
    values_s = [i / 1e3 for i in range(1, 102)]
    assert percentile_ms(values_s, 50) == pytest.approx(51)
    assert percentile_ms(values_s, 99) == pytest.approx(100)
    assert percentile_ms([0.1, 0.2], 99) == pytest.approx(199)
    assert percentile_ms([], 50) is None


def test_a_gap_is_divided_over_the_tokens_of_its_message() -> None:
    """One token at 11, three at 11.3, two at 11.4; the first has no gap."""
    trace = Trace(10.0, [11.0, 11.3, 11.3, 11.3, 11.4, 11.4])
    assert list(token_latencies_s(trace, WINDOW)) == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05])


def test_messages_that_come_together_are_one() -> None:
    trace = Trace(10.0, [11.0, 11.2, 11.2001, 11.2002, 11.2003, 11.3])
    assert list(token_latencies_s(trace, WINDOW)) == pytest.approx([0.05] * 4 + [0.1])


def test_everything_counts_where_it_happened() -> None:
    """Three answers: over the window's begin, inside, over its end (cancelled). Hand-counted."""
    found = figures_of(
        answer(2, 8.0, [9.0, 9.5, 10.0, 10.5]),
        answer(3, 11.0, [11.5, 12.0, 12.5]),
        answer(4, 18.0, [19.0, 19.5, 20.0], is_whole=False),
    )
    assert found.output_tokens_per_s == pytest.approx((2 + 3 + 2) / 10)
    assert (found.num_requests, found.requests_per_s) == (2, pytest.approx(0.2))
    assert found.ttft_p50_ms == pytest.approx(750)  # of 0.5 and 1 s; the first answer's wait ended before the window
    assert (found.token_p50_ms, found.token_p99_ms) == (pytest.approx(500), pytest.approx(500))
    assert (found.num_failures, found.num_cold, found.tokens_per_message) == (0, 0, 1)


def test_tokens_of_a_failed_request_do_not_count() -> None:
    found = figures_of(
        answer(2, 11.0, [12.0, 13.0]), answer(3, 11.0, [12.0, 12.1], is_whole=False, problem="UNAVAILABLE: gone")
    )
    assert (found.num_failures, found.problem) == (1, "UNAVAILABLE: gone")
    assert found.output_tokens_per_s == pytest.approx(0.2) and found.num_requests == 1


def test_a_request_that_hangs_through_the_window_has_failed() -> None:
    """Cancelling what is open at the end must not hide it."""
    assert figures_of(answer(2, 9.0, [], is_whole=False)).num_failures == 1
    assert figures_of(answer(2, 5.0, [9.9], is_whole=False)).num_failures == 1
    assert figures_of(answer(2, 9.0, [10.1], is_whole=False)).num_failures == 0


def test_a_warm_up_that_is_too_short_is_noticed() -> None:
    """First answers, numbers 0 and 1, must be over when the window begins."""
    over, late, still_open = answer(0, 1.0, [9.0]), answer(1, 1.0, [9.0, 10.0]), answer(1, 1.0, [19.0], is_whole=False)
    assert [figures_of(over, other).num_cold for other in (over, late, still_open)] == [0, 1, 1]


def test_without_answers_there_are_no_latencies() -> None:
    found = figures_of()
    assert found.output_tokens_per_s == 0 and found.ttft_p99_ms is None and found.tokens_per_message is None


def test_items_are_the_same_for_every_process_and_only_first_outputs_are_cut() -> None:
    again = EndlessItems(num_streams=2, prompt_tokens=(3, 5), output_tokens=(8, 8), vocab=50)
    assert [ITEMS[i] for i in range(40)] == [again[i] for i in range(40)] and ITEMS[2] != ITEMS[3]
    assert {len(ITEMS[i].prompt_ids) for i in range(40)} == {3, 4, 5}
    assert all(ITEMS[i].num_outputs == 8 for i in range(2, 40))
    many = EndlessItems(num_streams=200, prompt_tokens=(1, 1), output_tokens=(8, 8), vocab=50)
    assert {many[i].num_outputs for i in range(200)} == set(range(1, 9))


class FakeService:
    """Answers an item by how its prompt begins: whole, cut short, refused, or never."""

    def __init__(self) -> None:
        self.asked: list[Item] = []
        self.num_closed = 0

    async def ask(self, item: Item) -> AsyncIterator[Sequence[int]]:
        self.asked.append(item)
        await asyncio.sleep(0)
        kind = item.prompt_ids[0]
        if kind == 2:
            raise ConnectionError("refused")
        yield [7] * (item.num_outputs - 1)
        try:
            if kind == 3:
                await asyncio.Event().wait()
        finally:
            self.num_closed += 1
        if kind != 1:
            yield [7]


async def test_streams_take_turns_note_failures_and_are_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stream 0: whole, short, hangs. Stream 1: whole, refused, hangs."""
    monkeypatch.setattr(clients, "PAUSE_S", 0.0)
    items = [Item([kind], 3) for kind in (0, 0, 1, 2, 3, 3)]
    now_s = time.perf_counter()
    level = Level(num_streams=2, items=items, window=Window(begin_s=now_s, end_s=now_s + 0.05))
    service = FakeService()
    answers = sorted(await clients._loop([service.ask], level, range(2)), key=lambda answer: answer.number)
    assert [answer.number for answer in answers] == list(range(6))
    assert [answer.is_whole for answer in answers] == [True, True, False, False, False, False]
    problems = ["", "", "ended after 2 of 3 tokens", "ConnectionError: refused", "", ""]
    assert [answer.trace.problem for answer in answers] == problems
    assert len(answers[4].trace.token_s) == 2 and service.num_closed == 5


async def test_an_error_of_ours_ends_the_load() -> None:
    async def ask(item: Item) -> AsyncIterator[Sequence[int]]:
        raise ZeroDivisionError
        yield []

    with pytest.raises(ZeroDivisionError):
        now_s = time.perf_counter()
        await clients._loop(
            [ask], Level(num_streams=1, items=ITEMS, window=Window(begin_s=now_s, end_s=now_s + 60)), [0]
        )
