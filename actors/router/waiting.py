"""Requests that wait: their order, how fast they leave, and when their time is up.

Owns the order of admission (first come, first served; a preempted request goes back to the front), the estimate that
an overloaded client is told, and the deadlines of all live requests. Knows nothing of pages, ranks or clocks.
"""

import heapq
from collections import OrderedDict

from actors.router.requests import Phase, RequestState

MIN_RETRY_S = 1.0
MAX_RETRY_S = 30.0
RATE_WINDOW_S = 1.0
MIN_COMPACT = 64  # stale deadlines that are not worth a sweep


class WaitingQueue:
    """Queued requests in order of admission; removal from the middle costs the same as from the front."""

    def __init__(self) -> None:
        self._states: OrderedDict[str, RequestState] = OrderedDict()
        self._num_admitted = 0  # in the window
        self._window_start_s: float | None = None
        self._admitted_per_s: float | None = None

    def __len__(self) -> int:
        return len(self._states)

    def head(self) -> RequestState | None:
        return next(iter(self._states.values()), None)

    def append(self, state: RequestState) -> None:
        self._states[state.request_id] = state

    def push_front(self, state: RequestState) -> None:
        self._states[state.request_id] = state
        self._states.move_to_end(state.request_id, last=False)

    def remove(self, state: RequestState) -> None:
        del self._states[state.request_id]

    def pop_head(self) -> RequestState:
        """Takes the head out for admission. Raises KeyError where nothing waits."""
        _, state = self._states.popitem(last=False)
        self._num_admitted += 1
        return state

    def observe(self, now_s: float) -> None:
        """Keeps a running mean of admissions per second, over times in which something waited."""
        if not self._states or self._window_start_s is None:
            self._window_start_s, self._num_admitted = now_s, 0
            return
        elapsed_s = now_s - self._window_start_s
        if elapsed_s < RATE_WINDOW_S:
            return
        rate, before = self._num_admitted / elapsed_s, self._admitted_per_s
        self._admitted_per_s = rate if before is None else (rate + before) / 2
        self._window_start_s, self._num_admitted = now_s, 0

    def retry_after_s(self) -> float:
        """Seconds until what waits now is likely to have been admitted, within [MIN_RETRY_S, MAX_RETRY_S]."""
        if self._admitted_per_s is None:
            return MIN_RETRY_S
        if self._admitted_per_s * MAX_RETRY_S <= len(self._states):
            return MAX_RETRY_S
        return max(MIN_RETRY_S, len(self._states) / self._admitted_per_s)


class Deadlines:
    """When live requests run out of time. Those that end earlier stay as stale entries until a sweep."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, RequestState]] = []
        self._num_added = 0  # breaks ties, so that states are never compared

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline_s: float, state: RequestState, num_live: int) -> None:
        """`num_live` is the number of live requests; many more entries than that are mostly stale."""
        if len(self._heap) > 2 * num_live + MIN_COMPACT:
            self._heap = [entry for entry in self._heap if entry[2].phase is not Phase.DONE]
            heapq.heapify(self._heap)
        self._num_added += 1
        heapq.heappush(self._heap, (deadline_s, self._num_added, state))

    def pop_due(self, now_s: float) -> list[RequestState]:
        """Takes out the live requests whose deadline is not after `now_s`."""
        due = []
        while self._heap and self._heap[0][0] <= now_s:
            state = heapq.heappop(self._heap)[2]
            if state.phase is not Phase.DONE:
                due.append(state)
        return due
