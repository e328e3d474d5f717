"""One attention rank as the scheduler sees it: its pages, its running requests, the plan being made for it.

Owns the mechanics of a plan: granting and freeing pages, naming requests, preempting for a page, keeping score of what
is in flight. Decides nothing about who deserves tokens (`scheduler.py` does).

A rank executes plans in order. Hence pages of a request that leaves before this plan's work may be granted again in
this very plan, while pages that rows of this plan still read (a chunk that ends inside it) only in the next one.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from actors.errors import RankError
from actors.router.pages import PageGeometry, PagePool, RankPages
from actors.router.requests import Phase, RequestState
from actors.types import Admission, RankPlan, SampledToken, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Which requests a step in flight samples for, in the order of its work, and whose prompts it goes on with."""

    step: int
    sampling: list[RequestState]
    pieces: list[RequestState]


class RankPlanner:
    """State and plan in the making of one rank. Request indices are below `max_num_seqs`, the smallest free first."""

    def __init__(
        self, rank: int, pages: RankPages, geometry: PageGeometry, max_num_seqs: int, watermark_fraction: float
    ) -> None:
        self.rank = rank
        self.geometry = geometry
        self.global_pool = PagePool(pages.global_pages if geometry.has_global else 0)
        self.chunked_pool = PagePool(pages.chunked_pages if geometry.chunk_tokens else 0)
        self.running: list[RequestState] = []  # in order of admission
        self.prefilling: list[RequestState] = []  # those of them with more to compute than their newest token
        self.in_flight: deque[StepRecord] = deque()
        self.num_planned_tokens = 0  # in the plan being made
        self._max_num_seqs = max_num_seqs
        self._global_watermark = math.ceil(watermark_fraction * self.global_pool.num_pages)
        self._chunked_watermark = math.ceil(watermark_fraction * self.chunked_pool.num_pages)
        self._free_idxs = list(range(max_num_seqs))  # a heap
        self._released: list[int] = []  # not yet told to the rank
        self._begin_plan()

    def _begin_plan(self) -> None:
        self.num_planned_tokens = 0
        self._admitted: list[Admission] = []
        self._work: list[Work] = []
        self._sampling: list[RequestState] = []
        self._pieces: list[RequestState] = []
        self._ending: list[RequestState] = []
        self._dead_pages: list[int] = []  # of the chunked group: read by this plan, by no later one

    @property
    def num_free_seats(self) -> int:
        return self._max_num_seqs - len(self.running)

    def room_for(self, state: RequestState) -> int:
        """Pages of the scarcer group left after all of the request's known tokens; below 0: it cannot be admitted.

        What running prompts are still owed counts as taken. Beside other requests a watermark stays free, so that
        an admission does not cost a preemption at once; alone, a request may have all.
        """
        if not self.num_free_seats:
            return -1
        geometry, lefts = self.geometry, []
        if geometry.has_global:
            left = self.global_pool.num_free - geometry.pages_for(state.length)
            left -= sum(geometry.pages_for(other.length) - other.num_pages for other in self.prefilling)
            lefts.append(left if left >= self._global_watermark or not self.running else -1)
        if geometry.chunk_tokens:
            left = self.chunked_pool.num_free - geometry.live_pages_for(state.length)
            for other in self.prefilling:
                left -= max(0, geometry.live_pages_for(other.length) - len(other.chunked_pages))
            lefts.append(left if left >= self._chunked_watermark or not self.running else -1)
        return min(lefts)

    def admit(self, state: RequestState) -> None:
        """Makes the request run here, from its first token; its tokens must all be known (none in flight)."""
        state.phase = Phase.RUNNING
        state.rank = self.rank
        state.request_idx = heapq.heappop(self._free_idxs)
        state.computed = 0
        self.running.append(state)
        self.prefilling.append(state)
        self._admitted.append(
            Admission(
                request_idx=state.request_idx,
                prompt_ids=state.request.prompt_ids,
                output_ids=tuple(state.outputs),
                sampling=state.request.sampling,
            )
        )

    def release(self, state: RequestState, phase: Phase) -> None:
        """Takes a running request's pages and index back; the next plan that is sent names it as released."""
        self.running.remove(state)
        if state in self.prefilling:
            self.prefilling.remove(state)
        self.global_pool.free(state.global_pages)
        self.chunked_pool.free(state.chunked_pages)
        state.global_pages = []
        state.chunked_pages = []
        state.num_pages = 0
        state.phase = phase
        self._released.append(state.request_idx)
        heapq.heappush(self._free_idxs, state.request_idx)  # a plan's releases come before its admissions

    def decoding(self) -> list[RequestState]:
        """Running requests past their prompt, in order of admission. Not to be changed by the caller."""
        if not self.prefilling:
            return self.running
        prefilling = set(self.prefilling)
        return [state for state in self.running if state not in prefilling]

    def plan_decodes(self, states: Sequence[RequestState]) -> list[RequestState]:
        """Plans one token for each of `states` (in order of admission); returns the requests preempted for pages.

        Preempts from the youngest on, so that nobody who is in this plan already loses pages.
        """
        preempted: list[RequestState] = []
        work, sampling = self._work, self._sampling
        for state in states:
            if preempted and state.phase is not Phase.RUNNING:
                break  # it was among the youngest, and so is everyone after it
            start = state.computed
            if start == state.turn_at:
                self._plan_turn(state, preempted)
                continue
            work.append(Work(request_idx=state.request_idx, start=start, num_tokens=1, samples=True))
            sampling.append(state)
            state.computed = start + 1
            state.length += 1
            state.num_in_flight += 1
        self.num_planned_tokens += len(sampling)
        return preempted

    def _plan_turn(self, state: RequestState, preempted: list[RequestState]) -> None:
        """Plans a decode that needs a page, ends a chunk or is the last; not if `state` has to give way itself."""
        if state.computed < state.num_pages * self.geometry.page_tokens:
            self._append_work(state, 1, 0)
            return
        while not self._num_free_pages():
            victim = self.running[-1]
            self.release(victim, Phase.QUEUED)
            preempted.append(victim)
            if victim is state:
                return
        self._append_work(state, 1, self._grant(state, 1))

    def _num_free_pages(self) -> int:
        """How many pages of each group can be granted."""
        if not self.geometry.chunk_tokens:
            return self.global_pool.num_free
        if not self.geometry.has_global:
            return self.chunked_pool.num_free
        return min(self.global_pool.num_free, self.chunked_pool.num_free)

    def can_prefill(self) -> bool:
        """Whether a piece of any prompt could be planned now."""
        page_tokens, has_pages = self.geometry.page_tokens, self._num_free_pages() > 0
        return any(has_pages or state.computed < state.num_pages * page_tokens for state in self.prefilling)

    def plan_piece(self, state: RequestState, max_tokens: int) -> int:
        """Gives a prefilling request up to `max_tokens` more of its prompt, as far as pages go; returns how many.

        May be called again for the same request in one plan: the piece grows.
        """
        num_pages = state.num_pages
        room_tokens = (num_pages + self._num_free_pages()) * self.geometry.page_tokens
        start = state.computed + state.piece_tokens
        end = min(start + min(max_tokens, state.remaining), room_tokens)
        if end <= start:
            return 0
        if not state.piece_tokens:
            self._pieces.append(state)
        state.piece_pages += self._grant(state, max(0, self.geometry.pages_for(end) - num_pages))
        state.piece_tokens += end - start
        self.num_planned_tokens += end - start
        return end - start

    def _grant(self, state: RequestState, num_pages: int) -> int:
        if self.geometry.has_global:
            state.global_pages += self.global_pool.allocate(num_pages)
        if self.geometry.chunk_tokens:
            state.chunked_pages += self.chunked_pool.allocate(num_pages)
        state.num_pages += num_pages
        return num_pages

    def _append_work(self, state: RequestState, num_tokens: int, num_new_pages: int) -> None:
        """Writes down the next `num_tokens` of a request, with the pages just granted, and moves it on."""
        start, end = state.computed, state.computed + num_tokens
        samples = end == state.length
        new_global = tuple(state.global_pages[-num_new_pages:]) if num_new_pages else ()
        new_chunked = tuple(state.chunked_pages[-num_new_pages:]) if num_new_pages else ()
        self._work.append(
            Work(
                request_idx=state.request_idx,
                start=start,
                num_tokens=num_tokens,
                samples=samples,
                global_pages=new_global,
                chunked_pages=new_chunked,
            )
        )
        state.computed = end
        if samples:
            self._sampling.append(state)
            state.length += 1
            state.num_in_flight += 1
            if state.length == state.max_length:
                self._ending.append(state)
        state.turn_at = min(self.geometry.next_turn(end), state.max_length - 2)
        if self.geometry.chunk_tokens:
            self._retire_pages(state)

    def _retire_pages(self, state: RequestState) -> None:
        """Sets pages of chunks that are over aside; rows of this plan may still read them."""
        first = state.num_pages - len(state.chunked_pages)
        num_dead = self.geometry.first_live_page(state.computed) - first
        if num_dead > 0:
            self._dead_pages += state.chunked_pages[:num_dead]
            del state.chunked_pages[:num_dead]

    def finish_plan(self, step: int) -> RankPlan:
        """Seals the plan as step `step`, notes what it samples, and frees what no later plan reads."""
        for state in self._pieces:
            num_tokens, num_pages = state.piece_tokens, state.piece_pages
            state.piece_tokens = state.piece_pages = 0
            self._append_work(state, num_tokens, num_pages)
        self.prefilling = [state for state in self.prefilling if state.computed < state.length - 1]
        plan = RankPlan(released=tuple(self._released), admitted=tuple(self._admitted), work=tuple(self._work))
        self._released = []
        self.chunked_pool.free(self._dead_pages)
        for state in self._ending:
            self.release(state, Phase.DRAINING)
        self.in_flight.append(StepRecord(step=step, sampling=self._sampling, pieces=self._pieces))
        self._begin_plan()
        return plan

    def take_record(self, step: int, tokens: Sequence[SampledToken]) -> list[RequestState]:
        """The requests that `tokens` belong to. Raises RankError where they are not what the oldest step asked for."""
        expected = self.in_flight[0] if self.in_flight else None
        if expected is None or expected.step != step:
            awaited = "none is in flight" if expected is None else f"step {expected.step} is the next one awaited"
            raise RankError(self.rank, f"answered step {step}, but {awaited}")
        if [token.request_idx for token in tokens] != [state.request_idx for state in expected.sampling]:
            raise RankError(self.rank, f"step {step} did not sample for the requests that its plan names")
        self.in_flight.popleft()
        return expected.sampling
