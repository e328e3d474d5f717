"""The shared nouns, as frozen values that travel as msgpack.

Owns the words that ingress, router and ranks say to each other. Knows nothing of sockets, text or tensors. A message
is encoded as a msgpack array (field order is the wire order: append, never reorder), and the `tag` tells the members
of a union apart. `actors/wire.py` moves them.
"""

from typing import Literal

from msgspec import Struct

FinishReason = Literal["stop", "length"]
Role = Literal["attention", "expert"]
EMPTY_SLOT = -1  # in RankSpec.slots: room for an expert, and none in it


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


class RankEndpoints(Struct, frozen=True, array_like=True, kw_only=True):
    """Where a rank listens, tcp://host:port each: for commands, for plans, and for peers that copy its experts."""

    control: str
    steps: str
    weights: str = ""  # empty where it holds no experts


class RankSpec(Struct, frozen=True, array_like=True, kw_only=True):
    """One member of an epoch: its number, its roles, and the expert slots it holds.

    A number belongs to one process and is never given again. `slots[layer]` lists the experts held for that MoE layer,
    in slot order, EMPTY_SLOT where there is none; layers without slots are absent.

    Tensor-parallel attention makes several ranks one unit. `shard` is (index, of): which part of the unit's heads, FFN
    widths and output head this one holds. Shard 0 leads: it has plans of its own and answers them; the others name it
    as their `leader` and follow its plans. `expert_shard` is (index, of) too: which slice of its experts' widths.
    """

    rank: int
    roles: tuple[Role, ...]
    slots: dict[int, tuple[int, ...]] = {}
    shard: tuple[int, int] = (0, 1)
    leader: int = -1  # -1: the rank follows nobody
    expert_shard: tuple[int, int] = (0, 1)

    @property
    def unit(self) -> int:
        """Number of the rank that leads its unit: its own, where it follows nobody."""
        return self.rank if self.leader < 0 else self.leader

    @property
    def leads(self) -> bool:
        """Whether it has plans of its own."""
        return "attention" in self.roles and self.leader < 0


class Epoch(Struct, frozen=True, array_like=True, kw_only=True):
    """An immutable membership: who takes part, with which slots, and where its process group meets.

    `ranks` are in ascending order of their numbers; in the process group a rank is known by its position here. `store`
    is host:port of the rendezvous store; empty where one rank needs no group. `endpoints[position]` is where that rank
    listens for plans.
    """

    epoch: int
    ranks: tuple[RankSpec, ...]
    store: str = ""
    endpoints: tuple[str, ...] = ()

    def of_role(self, role: Role) -> tuple[int, ...]:
        """Numbers of the ranks that have `role`, ascending."""
        return tuple(spec.rank for spec in self.ranks if role in spec.roles)

    def leaders(self) -> tuple[int, ...]:
        """Numbers of the ranks that have plans of their own, ascending: one of each attention unit."""
        return tuple(spec.rank for spec in self.ranks if spec.leads)

    def unit_positions(self, rank: int) -> tuple[int, ...]:
        """Positions of the members of the unit that `rank` belongs to, in the order of their shards."""
        unit = self.ranks[self.position(rank)].unit
        members = [(spec.shard[0], i) for i, spec in enumerate(self.ranks) if spec.unit == unit]
        return tuple(position for _, position in sorted(members))

    def unit_of(self, rank: int) -> int:
        """Number of the rank that leads the unit of `rank`: its own, where it is no member."""
        return next((spec.unit for spec in self.ranks if spec.rank == rank), rank)

    def positions_of(self, role: Role) -> tuple[int, ...]:
        """Positions of the ranks that have `role`, ascending."""
        return tuple(i for i, spec in enumerate(self.ranks) if role in spec.roles)

    def position(self, rank: int) -> int:
        """Where rank number `rank` stands. Raises ValueError if it is no member."""
        return [spec.rank for spec in self.ranks].index(rank)


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
    """One step of one epoch. Every rank gets it; only attention ranks get a `rank_plan`: their own, or their leader's.

    `tokens_of_rank[i]` is the number of tokens that the rank at position i of the epoch brings into the step (0 for
    expert ranks), so that every rank knows the bounds of every message before it arrives. Ranks of one unit bring the
    same tokens, and each has their number there. A step that an epoch's end cut short comes again in the next one,
    under its old number, to those attention ranks that had not answered it.

    `sequence` counts the plans of an epoch, from 1 on: a rank that gets another than the next one has lost some on the
    way (a connection that was reset), and must not go on without them.
    """

    epoch: int
    step: int
    sequence: int
    tokens_of_rank: tuple[int, ...]
    rank_plan: RankPlan | None = None


class SampledToken(Struct, frozen=True, array_like=True, kw_only=True):
    """One sampled token; log-probabilities are natural logs of the unmodified distribution, as OpenAI's are."""

    request_idx: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


class StepResult(Struct, frozen=True, array_like=True, kw_only=True, tag="result"):
    """What a rank with a plan of its own sends back after a step, in the order of its work; others send none.

    `expert_tokens[layer][expert]` counts routed tokens since the last report; sent about once a second, else empty.
    """

    rank: int
    epoch: int
    step: int
    tokens: tuple[SampledToken, ...]
    elapsed_us: int
    expert_tokens: dict[int, tuple[int, ...]] = {}


class Attach(Struct, frozen=True, array_like=True, kw_only=True, tag="attach"):
    """A router takes this rank over. From now on the rank obeys this sender, unless its `term` is below the last one's
    (a router that was replaced). Answered by Attached.
    """

    term: int


class SlotSource(Struct, frozen=True, array_like=True, kw_only=True):
    """A peer that can give experts: its weights endpoint, and by layer the experts that it holds in its epoch."""

    endpoint: str
    experts: dict[int, tuple[int, ...]]


class Load(Struct, frozen=True, array_like=True, kw_only=True, tag="load"):
    """Hold what `spec` says, beside serving: a slot that the serving epoch names is never touched.

    Answered by Progress while it runs, then Loaded or Failed; at once where the rank holds all of it. Experts come from
    `sources` where one has them, else from the checkpoint. `pipeline` is the PipelineConfig as a plain dict; `epoch` is
    the number of the epoch that is being prepared.
    """

    epoch: int
    spec: RankSpec
    pipeline: dict[str, object]
    sources: tuple[SlotSource, ...] = ()


class Prepare(Struct, frozen=True, array_like=True, kw_only=True, tag="prepare"):
    """First phase of an epoch: validate the slots, reach every peer, form its group. Beside the steps of the epoch
    before, or, if it `hurries`, while nobody serves: then what can wait is left to the steps that need it.

    Answered by Prepared or Failed.
    """

    epoch: Epoch
    hurries: bool = False


class Join(Struct, frozen=True, array_like=True, kw_only=True, tag="join"):
    """Second phase, short, in the order of the plans: leave the epoch before and form the group of this one.

    An attention rank forgets all requests if `fresh`, else goes on with those it has; ranks of one unit are told the
    same. Answered by Joined or Failed.
    """

    epoch: int
    fresh: bool


class Leave(Struct, frozen=True, array_like=True, kw_only=True, tag="leave"):
    """The epoch is over: stop waiting for peers, now. The step that runs fails. No answer of its own."""

    epoch: int


class Beat(Struct, frozen=True, array_like=True, kw_only=True, tag="beat"):
    """The sender lives. Router to rank: renews the rank's lease, answered by Alive. Ingress to router: renews the
    ingress's lease, answered by RouterStatus.
    """


class Pace(Struct, frozen=True, array_like=True, kw_only=True):
    """What a rank has done since it began and how long it worked on it, waits for others left out. Counts only grow.

    Steps that brought it nothing are not counted. Rows are tokens of its own, and rows that its experts computed. On a
    GPU the time is the host's, which queues work: the device's is not told apart from its waits.
    """

    busy_us: int
    num_steps: int
    num_rows: int


class Alive(Struct, frozen=True, array_like=True, kw_only=True, tag="alive"):
    """Answers a Beat, whatever else the rank is doing. `pace` is None before its first step."""

    rank: int
    pace: Pace | None = None


class Attached(Struct, frozen=True, array_like=True, kw_only=True, tag="attached"):
    """What the rank holds, and of which pipeline (`PipelineConfig.contents`); None where it has loaded nothing yet."""

    rank: int
    spec: RankSpec | None = None
    contents: str = ""


class Progress(Struct, frozen=True, array_like=True, kw_only=True, tag="progress"):
    rank: int
    done_bytes: int
    total_bytes: int


class SlotProof(Struct, frozen=True, array_like=True, kw_only=True):
    """What a slot holds, in short. Slots with the same expert have the same checksum, and probes alike.

    `checksum` is over the stored bytes of weights and scales; `probe` is the mean magnitude of what the expert makes of
    a fixed input, and not finite where the expert is broken. Empty slots have zeros.
    """

    checksum: int
    probe: float


class Loaded(Struct, frozen=True, array_like=True, kw_only=True, tag="loaded"):
    """Weights are in place. Attention ranks state their KV room in pages; others state zeros.

    `proofs[layer]` has one entry per slot of the spec.
    """

    rank: int
    epoch: int
    weight_bytes: int
    page_tokens: int = 0
    global_pages: int = 0
    chunked_pages: int = 0
    proofs: dict[int, tuple[SlotProof, ...]] = {}


class Prepared(Struct, frozen=True, array_like=True, kw_only=True, tag="prepared"):
    rank: int
    epoch: int


class Joined(Struct, frozen=True, array_like=True, kw_only=True, tag="joined"):
    rank: int
    epoch: int


class Failed(Struct, frozen=True, array_like=True, kw_only=True, tag="failed"):
    """A command or step failed on this rank. If it was a step or a join, the epoch is over.

    `fatal` means that trying again is pointless (a broken checkpoint). `suspects` are ranks that it could not reach.
    """

    rank: int
    epoch: int
    problem: str
    fatal: bool = False
    suspects: tuple[int, ...] = ()


ToRank = Attach | Load | Prepare | Join | StepPlan | Leave | Beat
FromRank = Attached | Alive | Progress | Loaded | Prepared | Joined | StepResult | Failed


# --- ingress <-> router ------------------------------------------------------------------------------------------


class Submit(Struct, frozen=True, array_like=True, kw_only=True, tag="submit"):
    """`again`: the request was admitted before, by this router or by the one before it, and the channel was lost. It
    goes on after `request.output_ids`; what is known of it here is forgotten.
    """

    request: Request
    again: bool = False


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
    model: str = ""  # the checkpoint that answers come from


ToRouter = Submit | Cancel | Beat
FromRouter = TokenBatch | RouterStatus
