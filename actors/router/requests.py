"""One request as the router follows it from submission to its last event.

Owns the counters of a live request (what is computed, sampled, in flight, granted) and the wording of its events.
Knows nothing of queues, ranks or policy.
"""

from dataclasses import dataclass, field
from enum import Enum

from actors.types import ErrorInfo, FinishReason, Request, TokenEvent


class Phase(Enum):
    """Where a request is. Only RUNNING holds pages and a request_idx."""

    QUEUED = "queued"  # waits for admission; after a preemption its tokens may still be in flight
    RUNNING = "running"  # admitted to a rank
    DRAINING = "draining"  # its last token is in flight; pages and index are given back already
    DONE = "done"  # its last event is out; tokens that still come back are dropped


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """A live request. Lengths and positions are in tokens, counted from the start of the prompt.

    `length` counts prompt + outputs, those in flight too; `computed` counts positions whose KV is computed or planned.
    A request decodes when computed == length - 1.
    """

    request: Request
    owner: bytes
    max_length: int  # length at which it ends with "length": max_tokens, or the context is full
    request_id: str
    stop_ids: frozenset[int]
    min_tokens: int
    outputs: list[int]  # token ids known here; the rank may know one or two more
    length: int
    computed: int = 0
    num_in_flight: int = 0  # sampled tokens planned and not yet back
    phase: Phase = Phase.QUEUED
    rank: int = -1  # where it runs or ran last
    request_idx: int = -1  # its name there; kept until the next admission, since late tokens still carry it
    last_turn: int = 0  # when it last decoded while decodes had to take turns; these numbers are all different
    turn_at: int = 0  # the decode that starts here needs a page, ends a chunk or is the last one
    piece_tokens: int = 0  # prompt tokens given to it in the plan being made
    piece_pages: int = 0  # pages of each group granted with them
    num_pages: int = 0  # length of its page tables, the same in each group
    global_pages: list[int] = field(default_factory=list)  # the whole table
    chunked_pages: list[int] = field(default_factory=list)  # the live tail of the table

    @staticmethod
    def of(request: Request, owner: bytes, max_length: int) -> "RequestState":
        num_prompt, sampling = len(request.prompt_ids), request.sampling
        return RequestState(
            request=request,
            owner=owner,
            max_length=max_length,
            request_id=request.request_id,
            stop_ids=frozenset(sampling.stop_token_ids),
            min_tokens=sampling.min_tokens,
            outputs=list(request.output_ids),
            length=num_prompt + len(request.output_ids),
        )

    @property
    def remaining(self) -> int:
        """Tokens that are known or in flight and whose KV is neither computed nor planned."""
        return self.length - self.computed - self.piece_tokens

    def rewind(self) -> None:
        """Back to the queue: nothing is computed, no page is held. Its tokens must all be known."""
        self.phase, self.computed, self.rank = Phase.QUEUED, 0, -1
        self.piece_tokens = self.piece_pages = self.num_pages = 0
        self.global_pages, self.chunked_pages = [], []

    def finish_reason(self) -> FinishReason | None:
        """Why the outputs known so far end the request, or None. A stop id counts from index min_tokens on."""
        outputs = self.outputs
        if outputs and outputs[-1] in self.stop_ids and len(outputs) > self.min_tokens:
            return "stop"
        if len(self.request.prompt_ids) + len(outputs) >= self.max_length:
            return "length"
        return None

    def last_event(self, finish: FinishReason | None = None, error: ErrorInfo | None = None) -> TokenEvent:
        """The final news without tokens: a replay that was over already, or an error."""
        return TokenEvent(request_id=self.request_id, token_index=len(self.outputs), finish_reason=finish, error=error)
