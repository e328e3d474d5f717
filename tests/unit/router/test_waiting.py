"""Order of the queue, what overloaded clients are told, and deadlines that leave nothing behind."""

import pytest

from actors.router.requests import Phase, RequestState
from actors.router.waiting import MAX_RETRY_S, MIN_COMPACT, MIN_RETRY_S, Deadlines, WaitingQueue
from actors.types import Request, SamplingParams


def make_state(name: str) -> RequestState:
    request = Request(request_id=name, prompt_ids=(1,), sampling=SamplingParams(max_tokens=1))
    return RequestState.of(request, b"i", 2)


def names(queue: WaitingQueue) -> list[str]:
    return [queue.pop_head().request_id for _ in range(len(queue))]


def test_first_come_first_served_and_the_preempted_before_all() -> None:
    queue = WaitingQueue()
    states = {name: make_state(name) for name in "abcde"}
    for name in "abc":
        queue.append(states[name])
    queue.push_front(states["d"])
    queue.push_front(states["e"])
    queue.remove(states["b"])
    assert queue.head() is states["e"]
    assert names(queue) == ["e", "d", "a", "c"]
    assert queue.head() is None


def test_the_retry_delay_is_the_time_that_the_queue_takes() -> None:
    queue = WaitingQueue()
    assert queue.retry_after_s() == MIN_RETRY_S
    for number in range(30):
        queue.append(make_state(str(number)))
    queue.observe(100.0)
    for _ in range(10):
        queue.pop_head()
    queue.observe(100.5)
    queue.observe(102.0)  # ten in two seconds
    assert queue.retry_after_s() == pytest.approx(4.0)
    queue.observe(104.0)  # none in the next two: 2.5 a second on average
    assert queue.retry_after_s() == pytest.approx(8.0)
    for number in range(1000):
        queue.append(make_state(f"late {number}"))
    assert queue.retry_after_s() == MAX_RETRY_S


def test_idle_time_is_not_slowness() -> None:
    queue = WaitingQueue()
    for number in range(10):
        queue.append(make_state(str(number)))
    queue.observe(0.0)
    names(queue)
    queue.observe(1000.0)
    for number in range(5):
        queue.append(make_state(f"late {number}"))
    queue.observe(2000.0)
    queue.pop_head()
    assert queue.retry_after_s() <= MAX_RETRY_S


def test_deadlines_come_due_in_order_and_skip_what_has_ended() -> None:
    deadlines = Deadlines()
    states = [make_state(name) for name in "abc"]
    for state, deadline_s in zip(states, (3.0, 1.0, 2.0), strict=True):
        deadlines.add(deadline_s, state, 3)
    states[1].phase = Phase.DONE
    assert deadlines.pop_due(0.5) == []
    assert deadlines.pop_due(2.0) == [states[2]]
    assert deadlines.pop_due(9.0) == [states[0]]


def test_far_deadlines_of_ended_requests_do_not_pile_up() -> None:
    deadlines = Deadlines()
    for number in range(10_000):
        state = make_state(str(number))
        deadlines.add(1e9, state, 5)
        state.phase = Phase.DONE
    assert len(deadlines) <= 2 * 5 + MIN_COMPACT + 2
