"""The shared nouns, as frozen values that travel as msgpack.

Owns the words that ingress, router and ranks say to each other. Knows nothing of sockets, text or tensors. A message
is encoded as a msgpack array (field order is the wire order: append, never reorder), and the `tag` tells the members
of a union apart. `actors/wire.py` moves them.
"""

from typing import Literal

from msgspec import Struct

FinishReason = Literal["stop", "length"]
Role = Literal["attention", "expert"]


class SamplingParams(Struct, frozen=True, array_like=True, kw_only=True):
    """How to choose the tokens of one request. Values are validated at the ingress; ranks trust them.

    `max_tokens` is resolved (never above the room that the context leaves). `stop_token_ids` already holds the model's
    end-of-sequence ids unless the client set ignore_eos, so nobody below the ingress knows which ids are special.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    num_logprobs: int = -1  # -1 none; 0 the sampled token's; n also the n likeliest tokens'
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # stop_token_ids cannot be sampled before this many tokens
    seed: int = 0  # 64 bits, unsigned; with the token's index it keys the counter-based generator


class Request(Struct, frozen=True, array_like=True, kw_only=True):
    """One generation. `output_ids` are tokens that it already produced (a replay goes on after them)."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float | None = None  # Unix time in seconds; None is no deadline
    output_ids: tuple[int, ...] = ()


# --- router <-> attention and expert ranks -----------------------------------------------------------------------


class RankSpec(Struct, frozen=True, array_like=True, kw_only=True):
    """One member of an epoch: its number, its roles, and the expert slots it holds.

    `slots[layer]` lists the experts held for that MoE layer, in slot order; layers without slots are absent.
    """

    rank: int
    roles: tuple[Role, ...]
    slots: dict[int, tuple[int, ...]] = {}


class Epoch(Struct, frozen=True, array_like=True, kw_only=True):
    """An immutable membership: who takes part, with which slots, and where its process group meets.

    `store` is host:port of the rendezvous store; empty where one rank needs no group.
    """

    epoch: int
    ranks: tuple[RankSpec, ...]
    store: str = ""

    def of_role(self, role: Role) -> tuple[int, ...]:
        """Ranks that have `role`, ascending."""
        return tuple(spec.rank for spec in self.ranks if role in spec.roles)


class Admission(Struct, frozen=True, array_like=True, kw_only=True):
    """A request as an attention rank first hears of it, whole. `request_idx` names it until it is released."""

    request_idx: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    sampling: SamplingParams


class Work(Struct, frozen=True, array_like=True, kw_only=True):
    """What one request computes in one step: tokens [start, start + num_tokens) of prompt + outputs.

    A token the router has not seen yet (it is being sampled by the step before) is taken from the rank's own memory.
    Pages are those granted now, to be appended to the request's tables: page j of a table covers positions
    [j * page_tokens, (j + 1) * page_tokens). Tables of both groups start at position 0; pages of chunks that are over
    are freed by the router, and a rank never reads them again.
    """

    request_idx: int
    start: int
    num_tokens: int
    samples: bool  # the last position's logits are sampled in this step
    global_pages: tuple[int, ...] = ()
    chunked_pages: tuple[int, ...] = ()


class RankPlan(Struct, frozen=True, array_like=True, kw_only=True):
    """One attention rank's part of a step, as a diff: `released` first, then `admitted`, then `work`."""

    released: tuple[int, ...] = ()
    admitted: tuple[Admission, ...] = ()
    work: tuple[Work, ...] = ()


class StepPlan(Struct, frozen=True, array_like=True, kw_only=True, tag="plan"):
    """One step of one epoch. Every rank gets it; only attention ranks get a `rank_plan` (their own).

    `tokens_of_rank[i]` is the number of tokens that rank i of the epoch brings into the step (0 for expert ranks), so
    that every rank knows the bounds of every message before it arrives.
    """

    epoch: int
    step: int
    tokens_of_rank: tuple[int, ...]
    rank_plan: RankPlan | None = None


class SampledToken(Struct, frozen=True, array_like=True, kw_only=True):
    """One sampled token; log-probabilities are natural logs of the unmodified distribution, as OpenAI's are."""

    request_idx: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


class StepResult(Struct, frozen=True, array_like=True, kw_only=True, tag="result"):
    """What an attention rank sends back after a step, in the order of its work. Expert ranks send none.

    `expert_tokens[layer][expert]` counts routed tokens since the last report; sent about once a second, else empty.
    """

    rank: int
    epoch: int
    step: int
    tokens: tuple[SampledToken, ...]
    elapsed_us: int
    expert_tokens: dict[int, tuple[int, ...]] = {}


class Load(Struct, frozen=True, array_like=True, kw_only=True, tag="load"):
    """Load the weights for `spec`. Answered by Progress while it runs, then Loaded or Failed.

    A rank that already holds exactly these answers Loaded at once. `pipeline` is the PipelineConfig as a plain dict.
    """

    spec: RankSpec
    pipeline: dict[str, object]


class Prepare(Struct, frozen=True, array_like=True, kw_only=True, tag="prepare"):
    """First phase of an epoch: connect to its store, validate the slots. Answered by Prepared or Failed."""

    epoch: Epoch


class Join(Struct, frozen=True, array_like=True, kw_only=True, tag="join"):
    """Second phase, short: form the group, forget all requests. Answered by Joined or Failed."""

    epoch: int


class Beat(Struct, frozen=True, array_like=True, kw_only=True, tag="beat"):
    """The sender lives. Router to rank: renews the rank's lease. Ingress to router: renews the ingress's lease."""


class Progress(Struct, frozen=True, array_like=True, kw_only=True, tag="progress"):
    rank: int
    done_bytes: int
    total_bytes: int


class Loaded(Struct, frozen=True, array_like=True, kw_only=True, tag="loaded"):
    """Weights are in place. Attention ranks state their KV room in pages; others state zeros."""

    rank: int
    weight_bytes: int
    page_tokens: int = 0
    global_pages: int = 0
    chunked_pages: int = 0


class Prepared(Struct, frozen=True, array_like=True, kw_only=True, tag="prepared"):
    rank: int
    epoch: int


class Joined(Struct, frozen=True, array_like=True, kw_only=True, tag="joined"):
    rank: int
    epoch: int


class Failed(Struct, frozen=True, array_like=True, kw_only=True, tag="failed"):
    """A command or step failed on this rank. The epoch is over; the rank waits for the next one.

    `fatal` means that trying again is pointless (a broken checkpoint).
    """

    rank: int
    epoch: int
    problem: str
    fatal: bool = False


ToRank = Load | Prepare | Join | StepPlan | Beat
FromRank = Progress | Loaded | Prepared | Joined | StepResult | Failed


# --- ingress <-> router ------------------------------------------------------------------------------------------


class Submit(Struct, frozen=True, array_like=True, kw_only=True, tag="submit"):
    request: Request


class Cancel(Struct, frozen=True, array_like=True, kw_only=True, tag="cancel"):
    request_id: str


class ErrorInfo(Struct, frozen=True, array_like=True, kw_only=True):
    """An error of actors/errors.py on the wire: `kind` is its class name."""

    kind: str
    problem: str
    retry_after_s: float = 0.0


class TokenEvent(Struct, frozen=True, array_like=True, kw_only=True):
    """News of one request. The last one has `finish_reason` or `error`; exactly one last event is ever sent.

    `token_index` is the index of the first of `tokens` among the request's outputs (0-based); indices never skip or
    repeat.
    """

    request_id: str
    token_index: int
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None


class TokenBatch(Struct, frozen=True, array_like=True, kw_only=True, tag="tokens"):
    """All news of one step for one ingress."""

    events: tuple[TokenEvent, ...]


class RouterStatus(Struct, frozen=True, array_like=True, kw_only=True, tag="status"):
    """The router's state, sent on each Beat of an ingress and on a change of `serving`."""

    serving: bool
    detail: str  # one line for people: what is being loaded, which rank was lost
    epoch: int = 0
    num_running: int = 0
    num_queued: int = 0
    kv_used_fraction: float = 0.0


ToRouter = Submit | Cancel | Beat
FromRouter = TokenBatch | RouterStatus
