"""Continuous batching: who computes what in the next step, and what comes of it.

Owns every request from submission to its one last event, and the policy below. A pure state machine: time is passed in,
plans and events are returned. Knows nothing of sockets, epochs, text or tensors.

Policy. Each step has `max_num_batched_tokens`, over all ranks. Decodes come first, one token per running request; where
they alone exceed the budget they take turns, and leave an eighth to prompts. The rest goes to prompts, an equal share
per rank, oldest first; a prompt that cannot finish in this step takes at most half of what is left while others wait,
so that a short prompt passes a long one; what nobody wanted goes to the oldest. Requests are admitted first come, first
served, to the rank with most free pages, when their whole prompt has room: the head of the queue is never overtaken,
so nobody starves. A decode that finds no page preempts the youngest of its rank, which goes back to the head of the
queue and is computed again; the oldest always gets on, so everyone ends.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from actors.errors import OverloadedError, RankError, RequestError
from actors.router.limits import SchedulerLimits
from actors.router.pages import PageGeometry, RankPages
from actors.router.rank_plan import RankPlanner
from actors.router.requests import Phase, RequestState
from actors.router.waiting import Deadlines, WaitingQueue
from actors.types import ErrorInfo, RankPlan, Request, SampledToken, TokenEvent

__all__ = ["Load", "OwnedEvent", "RankPages", "Scheduler", "SchedulerLimits"]

PROMPT_RESERVE = 8  # one token in this many stays for prompts where decodes exceed the budget


class OwnedEvent(NamedTuple):
    """News of a request, and the ingress that it is for."""

    owner: bytes
    event: TokenEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A snapshot. Pages are summed over ranks; `step_*` describe the last planned step; `num_preemptions`,
    `num_steps`, `computed_tokens` and `sampled_tokens` count from the start.
    """

    num_running: int  # live and not queued
    num_queued: int
    global_pages_used: int
    global_pages_total: int
    chunked_pages_used: int
    chunked_pages_total: int
    step_tokens: int
    step_requests: int
    num_steps: int
    num_preemptions: int
    computed_tokens: int
    sampled_tokens: int

    def as_dict(self) -> dict[str, float]:
        """The counts by name, for people."""
        return asdict(self) | {"kv_used_fraction": self.kv_used_fraction}

    @property
    def kv_used_fraction(self) -> float:
        """Used part of the fuller page group, in [0, 1]."""
        used = (self.global_pages_used, self.global_pages_total), (self.chunked_pages_used, self.chunked_pages_total)
        return max((part / total for part, total in used if total), default=0.0)


class Scheduler:
    """Drive it so: `submit`, `cancel`, `expire` as news comes in; `schedule` after these and after each `complete`,
    until it returns None; `complete` for every attention rank and step, in order. All events that methods return must
    be sent: a request's token indices never skip or repeat, and it gets exactly one last event.

    Requests end with "length" where max_tokens, max_model_len or the pages of the smallest rank say so.
    """

    def __init__(self, limits: SchedulerLimits, ranks: Mapping[int, RankPages] | None = None) -> None:
        """`ranks` are the attention ranks, if there are any yet. Without ranks requests are queued."""
        self.limits = limits
        self.geometry = PageGeometry(
            page_tokens=limits.page_tokens, chunk_tokens=limits.chunk_tokens, has_global=limits.has_global_layers
        )
        self._queue = WaitingQueue()
        self._deadlines = Deadlines()
        self._live: dict[str, RequestState] = {}
        self._events_due: list[OwnedEvent] = []  # of requests that ended where no events are returned
        self._num_steps = 0
        self._num_turns = 0
        self._step_tokens = self._step_requests = 0
        self._computed_tokens = self._sampled_tokens = self._num_preemptions = 0
        self._max_request_tokens = limits.max_model_len  # what the ranks of the latest epoch can hold
        self._ranks: dict[int, RankPlanner] = {}
        self._add_ranks(ranks or {}, ranks or {})

    def _add_ranks(self, new: Mapping[int, RankPages], ranks: Mapping[int, RankPages]) -> None:
        """Adds the ranks of `new`; `ranks` are all there are now."""
        limits, geometry = self.limits, self.geometry
        for rank, pages in new.items():
            self._ranks[rank] = RankPlanner(rank, pages, geometry, limits.max_num_seqs, limits.watermark_fraction)
        self._ranks = dict(sorted(self._ranks.items()))
        if ranks:
            # A rank with less may be where a request lands, so the smallest counts.
            self._max_request_tokens = min(
                geometry.max_request_tokens(pages, limits.max_model_len) for pages in ranks.values()
            )

    # --- news from clients ---

    def submit(self, request: Request, owner: bytes, now_s: float, again: bool = False) -> None:
        """Queues a request for `owner`. A replay whose `output_ids` end it already is answered by the next `expire`.

        Raises OverloadedError where the queue is full (not for requests that were admitted before and come `again`),
        RequestError where the request can never run.
        """
        if request.request_id in self._live:
            raise RequestError("request_id", f"{request.request_id!r} is live already")
        state = RequestState.of(request, owner, self._max_length(request))
        reason = state.finish_reason()
        if reason is not None:
            self._events_due.append(OwnedEvent(owner, state.last_event(finish=reason)))
            return
        self._queue.observe(now_s)
        num_waiting, max_waiting = len(self._queue), self.limits.max_queued_requests
        if not again and num_waiting >= max_waiting and num_waiting >= max_waiting + self._num_open_seats():
            raise OverloadedError(f"{num_waiting} requests are waiting already", self._queue.retry_after_s())
        self._live[state.request_id] = state
        self._queue.append(state)
        if request.deadline_s is not None:
            self._deadlines.add(request.deadline_s, state, len(self._live))

    def _max_length(self, request: Request) -> int:
        """Tokens at which the request is over. Raises RequestError where it can never have one token of output."""
        num_prompt, longest = len(request.prompt_ids), self._max_request_tokens
        if num_prompt == 0:
            raise RequestError("prompt", "is empty")
        if request.sampling.max_tokens < 1:
            raise RequestError("max_tokens", "must be at least 1")
        if num_prompt + 1 > longest:
            whose = "the model's context" if longest == self.limits.max_model_len else "the KV cache"
            raise RequestError("prompt", f"has {num_prompt} tokens; {whose} holds {longest - 1} and one of output")
        return min(num_prompt + request.sampling.max_tokens, longest)

    def _num_open_seats(self) -> int:
        """How many of the queued requests the next plans can admit, as far as seats go; 0 if pages hold them up."""
        if len(self._queue) and self._next_admission() is None:
            return 0
        return sum(rank.num_free_seats for rank in self._ranks.values())

    def cancel(self, request_id: str) -> list[OwnedEvent]:
        """Ends a request; its pages are free for the next plan. No event where it is over already, or unknown."""
        state = self._live.get(request_id)
        return [] if state is None else [self._fail(state, _CANCELLED)]

    def forget(self, request_id: str) -> None:
        """Ends a request without an event: who asked for it asks again, with the tokens that arrived."""
        state = self._live.get(request_id)
        if state is not None:
            self._end(state)

    def cancel_owner(self, owner: bytes) -> list[OwnedEvent]:
        """Ends all requests of an ingress that went away. There may be nobody to send the events to."""
        return [self._fail(state, _CANCELLED) for state in list(self._live.values()) if state.owner == owner]

    def expire(self, now_s: float) -> list[OwnedEvent]:
        """Ends requests whose `deadline_s` has come, queued or running. Call it before each `schedule`.

        Also returns the last events of requests that ended in `submit` or `change_ranks`.
        """
        events, self._events_due = self._events_due, []
        for state in self._deadlines.pop_due(now_s):
            problem = f"the deadline passed after {len(state.outputs)} tokens"
            events.append(self._fail(state, ErrorInfo(kind="DeadlineError", problem=problem)))
        return events

    def _fail(self, state: RequestState, error: ErrorInfo) -> OwnedEvent:
        self._end(state)
        return OwnedEvent(state.owner, state.last_event(error=error))

    def _end(self, state: RequestState) -> None:
        """Forgets a request, wherever it is; tokens that still come back for it are dropped."""
        if state.phase is Phase.RUNNING:
            self._ranks[state.rank].release(state, Phase.DONE)
        elif state.phase is Phase.QUEUED:
            self._queue.remove(state)
        state.phase = Phase.DONE
        del self._live[state.request_id]

    # --- planning ---

    def schedule(self, now_s: float) -> dict[int, RankPlan] | None:
        """Plans the next step: a plan for every attention rank, those without work too. None where there is nothing to
        compute now, or `max_steps_in_flight` steps are in flight.

        A step may be planned before the one before it has answered: its tokens are on the ranks. The steps that are
        returned count 1, 2, … over the scheduler's life, epochs included. `now_s` only feeds the estimate for
        overloaded clients.
        """
        ranks = self._ranks.values()
        if not ranks or self.num_steps_in_flight >= self.limits.max_steps_in_flight:
            return None
        self._queue.observe(now_s)
        num_preemptions, step_tokens = self._num_preemptions, self._plan_work()
        while step_tokens == 0 and self._num_preemptions > num_preemptions:
            # All whose turn it was gave way to requests whose turn it was not.
            num_preemptions, step_tokens = self._num_preemptions, self._plan_work()
        if step_tokens == 0:
            return None
        self._num_steps += 1
        plans = {rank.rank: rank.finish_plan(self._num_steps) for rank in ranks}
        self._step_tokens = step_tokens
        self._step_requests = sum(len(plan.work) for plan in plans.values())
        self._computed_tokens += step_tokens
        return plans

    @property
    def num_steps_in_flight(self) -> int:
        """Steps planned whose result is not in from every rank."""
        return max((len(rank.in_flight) for rank in self._ranks.values()), default=0)

    @property
    def num_seats(self) -> int:
        """Requests that can run at once."""
        return self.limits.max_num_seqs * len(self._ranks)

    def num_pages_used(self, rank: int) -> int:
        """Pages of both groups that requests hold on an attention rank; 0 for any other."""
        planner = self._ranks.get(rank)
        return planner.global_pool.num_used + planner.chunked_pool.num_used if planner else 0

    @property
    def queue_s(self) -> float:
        """Seconds until what waits now is likely to have been admitted; 0 if nothing waits."""
        return self._queue.retry_after_s() if len(self._queue) else 0.0

    @property
    def has_requests(self) -> bool:
        """Whether any request is live."""
        return bool(self._live)

    def _plan_work(self) -> int:
        """Fills the plans of all ranks; returns their tokens."""
        ranks = self._ranks.values()
        self._plan_decodes()
        num_left = self.limits.max_num_batched_tokens - sum(rank.num_planned_tokens for rank in ranks)
        if num_left > 0:
            self._plan_prompts(num_left)
        return sum(rank.num_planned_tokens for rank in ranks)

    def _plan_decodes(self) -> None:
        decoding = {rank: planner.decoding() for rank, planner in self._ranks.items()}
        budget = self.limits.max_num_batched_tokens
        if sum(map(len, decoding.values())) > budget - self._prompt_reserve():
            decoding = self._take_turns(decoding)
        for rank, states in decoding.items():
            for victim in self._ranks[rank].plan_decodes(states):
                self._queue.push_front(victim)
                self._num_preemptions += 1

    def _prompt_reserve(self) -> int:
        """Tokens that decodes leave to prompts, should any be there. A budget of 1 alternates."""
        budget = self.limits.max_num_batched_tokens
        return max(1, budget // PROMPT_RESERVE) if budget > 1 else self._num_steps % 2

    def _take_turns(self, decoding: dict[int, list[RequestState]]) -> dict[int, list[RequestState]]:
        """Picks those that waited longest, as many as the budget allows.

        Only prompts that have pages to go on hold decodes back, or a step might come out empty.
        """
        prompts_can_go_on = any(rank.can_prefill() for rank in self._ranks.values()) or self._next_admission()
        num_turns = self.limits.max_num_batched_tokens - (self._prompt_reserve() if prompts_can_go_on else 0)
        everyone = [state for states in decoding.values() for state in states]
        everyone.sort(key=lambda state: state.last_turn)
        chosen = set(everyone[:num_turns])
        for state in everyone[:num_turns]:
            self._num_turns += 1
            state.last_turn = self._num_turns
        return {rank: [state for state in states if state in chosen] for rank, states in decoding.items()}

    def _plan_prompts(self, num_left: int) -> None:
        """Spends what decodes left: an equal share per rank, then admissions, then whatever is over."""
        share = -(-num_left // len(self._ranks))
        others_wait = len(self._queue) + sum(len(rank.prefilling) for rank in self._ranks.values()) > 1
        for rank in self._ranks.values():
            share_left = min(share, num_left)
            for state in rank.prefilling:
                num_planned = rank.plan_piece(state, self._portion(state, share_left, others_wait))
                share_left -= num_planned
                num_left -= num_planned
        num_left = self._admit(num_left)
        for rank in sorted(self._ranks.values(), key=lambda rank: rank.num_planned_tokens):
            for state in rank.prefilling:
                num_left -= rank.plan_piece(state, num_left)

    def _portion(self, state: RequestState, num_left: int, others_wait: bool) -> int:
        """All that is left to a prompt that ends with it, or that nobody waits behind; else half, at least a page."""
        if state.remaining <= num_left or not others_wait:
            return num_left
        return min(num_left, max(num_left // 2, self.geometry.page_tokens))

    def _admit(self, num_left: int) -> int:
        """Admits from the head of the queue while tokens and pages last; returns the tokens left."""
        while num_left > 0 and (admission := self._next_admission()) is not None:
            state, rank = admission
            self._queue.pop_head()
            rank.admit(state)
            num_left -= rank.plan_piece(state, self._portion(state, num_left, len(self._queue) > 0))
        return num_left

    def _next_admission(self) -> tuple[RequestState, RankPlanner] | None:
        """The head of the queue and the rank with most pages left once it is there, the lowest of equals.

        None where nothing waits, no rank has room, or the head was preempted and its newest tokens are not back yet.
        """
        state = self._queue.head()
        if state is None or state.num_in_flight:
            return None
        best, most_left = None, -1
        for rank in self._ranks.values():
            num_left = rank.room_for(state)
            if num_left > most_left:
                best, most_left = rank, num_left
        return None if best is None else (state, best)

    # --- results ---

    def complete(self, rank: int, step: int, tokens: Sequence[SampledToken]) -> list[OwnedEvent]:
        """Takes in what `rank` sampled in `step`, in the order of its work; every rank answers every step.

        Raises RankError where that is not the answer awaited next; nothing has changed then.
        """
        planner = self._ranks.get(rank)
        if planner is None:
            raise RankError(rank, f"answered step {step}, but is not an attention rank here")
        events: list[OwnedEvent] = []
        done = Phase.DONE
        for state, token in zip(planner.take_record(step, tokens), tokens, strict=True):
            if state.phase is done:
                continue  # it ended while this token was in flight
            outputs = state.outputs
            outputs.append(token.token_id)
            state.num_in_flight -= 1
            reason = state.finish_reason()
            event = TokenEvent(
                request_id=state.request_id, token_index=len(outputs) - 1, tokens=(token,), finish_reason=reason
            )
            events.append(OwnedEvent(state.owner, event))
            if reason is not None:
                self._end(state)
        self._sampled_tokens += len(events)
        return events

    # --- epochs ---

    def in_flight(self) -> list[RequestState]:
        """Live requests in steps that are planned and not answered, each once."""
        records = [record for planner in self._ranks.values() for record in planner.in_flight]
        states = dict.fromkeys(state for record in records for state in (*record.sampling, *record.pieces))
        return [state for state in states if state.phase is not Phase.DONE]

    def fail(self, states: Sequence[RequestState], error: ErrorInfo) -> list[OwnedEvent]:
        """Ends live requests."""
        return [self._fail(state, error) for state in states]

    def fail_all(self, error: ErrorInfo) -> list[OwnedEvent]:
        """Ends every live request: there is nobody to serve it any more."""
        events, self._events_due = self._events_due, []
        return events + [self._fail(state, error) for state in list(self._live.values())]

    def change_ranks(self, ranks: Mapping[int, RankPages], kept: Collection[int]) -> None:
        """Begins an epoch with these attention ranks. Those in `kept` still have their requests, pages and the steps
        that they have not answered; the others have none, and all their pages are free.

        Requests of any other rank go back to the head of the queue, oldest first, to be computed again from prompt and
        outputs, wherever there is room. Those that no longer fit anywhere end.
        """
        for rank, planner in list(self._ranks.items()):
            if rank not in ranks or rank not in kept:
                self._requeue(planner)
                del self._ranks[rank]
        self._add_ranks({rank: pages for rank, pages in ranks.items() if rank not in self._ranks}, ranks)
        for state in [state for state in self._live.values() if state.phase is Phase.QUEUED]:
            if state.length + 1 > self._max_request_tokens:
                problem = f"{state.length} tokens no longer fit: the KV cache shrank to {self._max_request_tokens}"
                self._events_due.append(self._fail(state, ErrorInfo(kind="UnavailableError", problem=problem)))
            else:
                state.max_length = self._max_length(state.request)

    def _requeue(self, planner: RankPlanner) -> None:
        """Queues the requests of a rank that is gone again, as far as their tokens are known here."""
        draining = []
        for record in planner.in_flight:
            for state in record.sampling:  # running, preempted, or over but for a token that will not come now
                if state.phase is not Phase.DONE and state.num_in_flight:
                    state.length -= state.num_in_flight
                    state.num_in_flight = 0
                    if state.phase is Phase.DRAINING:
                        draining.append(state)
        for state in reversed([*draining, *planner.running]):
            state.rewind()
            self._queue.push_front(state)

    # --- what people see ---

    def load(self) -> Load:
        """Counts as of now; cheap enough for every step."""
        ranks = self._ranks.values()
        return Load(
            num_running=len(self._live) - len(self._queue),
            num_queued=len(self._queue),
            global_pages_used=sum(rank.global_pool.num_used for rank in ranks),
            global_pages_total=sum(rank.global_pool.num_pages for rank in ranks),
            chunked_pages_used=sum(rank.chunked_pool.num_used for rank in ranks),
            chunked_pages_total=sum(rank.chunked_pool.num_pages for rank in ranks),
            step_tokens=self._step_tokens,
            step_requests=self._step_requests,
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            computed_tokens=self._computed_tokens,
            sampled_tokens=self._sampled_tokens,
        )


_CANCELLED = ErrorInfo(kind="RequestCancelledError", problem="the request was cancelled")
