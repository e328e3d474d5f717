"""A rank that executes plans literally, a model whose next token depends on every token before it, and a driver.

The rank keeps physical pages. It writes all rows of a step before it reads any (as attention layers may), and reads
exactly the pages that each row's positions require, so a page that is freed early, granted twice or missing shows as a
foreign or stale entry; a mistake in recompute shows as another token.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.router.pages import PageGeometry
from actors.router.scheduler import OwnedEvent, RankPages, Scheduler, SchedulerLimits
from actors.types import RankPlan, Request, SampledToken, SamplingParams, Work

VOCAB = 23


def next_token(context: Sequence[int], chunk: Sequence[int]) -> int:
    """The fake model: global layers see `context`, chunked layers only `chunk`."""
    value = 17
    for token in context:
        value = (value * 1_000_003 + token + 1) % 2_147_483_647
    for token in chunk:
        value = (value * 998_244_353 + token + 7) % 2_147_483_647
    return value // 5 % VOCAB


def generate(request: Request, geometry: PageGeometry, room: int) -> tuple[list[int], str]:
    """What the request must produce, one token at a time and alone: (all output ids, finish reason)."""
    tokens = [*request.prompt_ids]
    outputs: list[int] = []
    sampling = request.sampling
    while True:
        chunk_start = (len(tokens) - 1) // geometry.chunk_tokens * geometry.chunk_tokens if geometry.chunk_tokens else 0
        token = next_token(tokens if geometry.has_global else (), tokens[chunk_start:] if geometry.chunk_tokens else ())
        tokens.append(token)
        outputs.append(token)
        if token in sampling.stop_token_ids and len(outputs) - 1 >= sampling.min_tokens:
            return outputs, "stop"
        if len(outputs) == sampling.max_tokens or len(tokens) == room:
            return outputs, "length"


@dataclass
class Resident:
    """What a rank knows of one admitted request."""

    uid: int
    tokens: list[int]
    computed: int = 0
    reads_from: int = 0  # position of its first row in the plan under way, else of its next row
    global_table: list[int] = field(default_factory=list)
    chunked_table: list[int] = field(default_factory=list)


class FakeRank:
    """Executes plans in order; every assertion is a promise that types.py or the scheduler makes to ranks."""

    def __init__(self, pages: RankPages, geometry: PageGeometry, max_num_seqs: int) -> None:
        self.geometry = geometry
        self.max_num_seqs = max_num_seqs
        self.residents: dict[int, Resident] = {}
        self.pages = {"global": pages.global_pages, "chunked": pages.chunked_pages}
        self.memory: dict[tuple[str, int], dict[int, tuple[int, int, int]]] = {}
        self.owners: dict[tuple[str, int], tuple[Resident, int]] = {}  # (group, page) -> (owner, index in its table)
        self.num_admitted = 0

    def execute(self, plan: RankPlan) -> tuple[SampledToken, ...]:
        self.take_in(plan)
        return self.run(plan)

    def take_in(self, plan: RankPlan) -> None:
        """What happens once, however often the step is run."""
        for idx in plan.released:
            self._release(idx)
        for admission in plan.admitted:
            assert 0 <= admission.request_idx < self.max_num_seqs
            assert admission.request_idx not in self.residents, "index reused before its release"
            self.num_admitted += 1
            self.residents[admission.request_idx] = Resident(
                self.num_admitted, [*admission.prompt_ids, *admission.output_ids]
            )
        assert len({work.request_idx for work in plan.work}) == len(plan.work), "two pieces of one request in a step"
        for work in plan.work:
            self.residents[work.request_idx].reads_from = work.start
        for work in plan.work:
            self._grant(work)

    def run(self, plan: RankPlan) -> tuple[SampledToken, ...]:
        for work in plan.work:
            self._write(work)
        sampled = [self._read(work) for work in plan.work]
        return tuple(token for token in sampled if token is not None)

    def _release(self, idx: int) -> None:
        resident = self.residents.pop(idx)
        for key in [key for key, (owner, _) in self.owners.items() if owner is resident]:
            del self.owners[key]

    def _grant(self, work: Work) -> None:
        resident = self.residents[work.request_idx]
        for group, table, pages in (
            ("global", resident.global_table, work.global_pages),
            ("chunked", resident.chunked_table, work.chunked_pages),
        ):
            for page in pages:
                assert 0 <= page < self.pages[group]
                self._assert_unneeded(group, page)
                self.owners[group, page] = resident, len(table)
                table.append(page)

    def _assert_unneeded(self, group: str, page: int) -> None:
        owner, index = self.owners.get((group, page), (None, 0))
        if owner is None:
            return
        assert group == "chunked", f"global page {page} has two live owners"
        assert index < self.geometry.first_live_page(owner.reads_from), f"chunked page {page} has two live owners"

    def _write(self, work: Work) -> None:
        resident, size = self.residents[work.request_idx], self.geometry.page_tokens
        assert work.num_tokens >= 1
        assert work.start == resident.computed, "positions are not contiguous"
        end = work.start + work.num_tokens
        assert end <= len(resident.tokens), "a token that nobody has"
        assert work.samples == (end == len(resident.tokens)), "samples exactly at the newest token"
        for group, table in self._groups(resident):
            for position in range(work.start, end):
                page = table[position // size]
                entry = resident.uid, position, resident.tokens[position]
                self.memory.setdefault((group, page), {})[position % size] = entry
        resident.computed = resident.reads_from = end

    def _groups(self, resident: Resident) -> list[tuple[str, list[int]]]:
        groups = [("global", resident.global_table)] if self.geometry.has_global else []
        return groups + ([("chunked", resident.chunked_table)] if self.geometry.chunk_tokens else [])

    def _read(self, work: Work) -> SampledToken | None:
        resident, size, chunk = self.residents[work.request_idx], self.geometry.page_tokens, self.geometry.chunk_tokens
        seen: dict[str, list[int]] = {"global": [], "chunked": []}
        for row in range(work.start, work.start + work.num_tokens):
            for group, table in self._groups(resident):
                first = row // chunk * chunk if group == "chunked" else 0
                entries = [self.memory[group, table[p // size]][p % size] for p in range(first, row + 1)]
                assert [entry[:2] for entry in entries] == [(resident.uid, p) for p in range(first, row + 1)], (
                    f"{group} pages of request {work.request_idx} were lost before position {row} read them"
                )
                seen[group] = [entry[2] for entry in entries]
        if not work.samples:
            return None
        token = next_token(seen["global"], seen["chunked"])
        resident.tokens.append(token)
        return SampledToken(request_idx=work.request_idx, token_id=token)


@dataclass
class Client:
    """What came of one submitted request, judged as it comes."""

    request: Request
    owner: bytes
    expected: list[int]
    reason: str
    got: list[int]
    ended: str = ""  # finish reason, or kind of error

    def take(self, owned: OwnedEvent) -> None:
        event = owned.event
        assert owned.owner == self.owner
        assert not self.ended, "news after the last event"
        assert event.token_index == len(self.got), "token indices skip or repeat"
        self.got += [token.token_id for token in event.tokens]
        assert self.got == self.expected[: len(self.got)], "tokens differ from the fault-free simulation"
        if event.finish_reason is not None:
            self.ended = event.finish_reason
            assert self.got == self.expected
            assert self.ended == self.reason
        elif event.error is not None:
            self.ended = event.error.kind


class Driver:
    """A scheduler with fake ranks behind it. Ranks run a plan when it is made; results wait until `deliver`."""

    def __init__(self, limits: SchedulerLimits, ranks: dict[int, RankPages]) -> None:
        self.limits = limits
        self.ranks = ranks
        self.scheduler = Scheduler(limits, ranks)
        self.geometry = self.scheduler.geometry
        self.room = min(self.geometry.max_request_tokens(pages, limits.max_model_len) for pages in ranks.values())
        self.clients: dict[str, Client] = {}
        self.step = 0
        self.now_s = 0.0
        self.plans: list[dict[int, RankPlan]] = []
        self._make_ranks()

    def _make_ranks(self) -> None:
        self.fakes: dict[int, FakeRank] = {}
        self.results: dict[int, deque[tuple[int, tuple[SampledToken, ...]]]] = {}
        for rank in self.ranks:
            self._make_rank(rank)

    def _make_rank(self, rank: int) -> None:
        self.fakes[rank] = FakeRank(self.ranks[rank], self.geometry, self.limits.max_num_seqs)
        self.results[rank] = deque()

    def submit(
        self, num_prompt: int, max_tokens: int, *, owner: bytes = b"i", replay: int = 0,
        deadline_s: float | None = None, salt: int = 0, **sampling: Any,
    ) -> str:  # fmt: skip
        """Submits a request whose prompt is made from its number; `replay` tokens were produced before."""
        number = len(self.clients)
        prompt = tuple((7 * number + 3 * i + salt) % VOCAB for i in range(num_prompt))
        request = Request(
            request_id=f"r{number}",
            prompt_ids=prompt,
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),
            deadline_s=deadline_s,
        )
        expected, reason = generate(request, self.geometry, self.room)
        request = Request(
            request_id=request.request_id,
            prompt_ids=prompt,
            sampling=request.sampling,
            deadline_s=deadline_s,
            output_ids=tuple(expected[:replay]),
        )
        self.scheduler.submit(request, owner, self.now_s)
        self.clients[request.request_id] = Client(request, owner, expected, reason, list(request.output_ids))
        return request.request_id

    def take(self, events: list[OwnedEvent]) -> None:
        for owned in events:
            self.clients[owned.event.request_id].take(owned)

    def schedule(self) -> dict[int, RankPlan] | None:
        self.take(self.scheduler.expire(self.now_s))
        plans = self.scheduler.schedule(self.now_s)
        if plans is None:
            return None
        self.step += 1
        self.plans.append(plans)
        num_tokens = sum(work.num_tokens for plan in plans.values() for work in plan.work)
        assert 1 <= num_tokens <= self.limits.max_num_batched_tokens
        assert list(plans) == sorted(self.ranks)
        for rank, plan in plans.items():
            self.results[rank].append((self.step, self.fakes[rank].execute(plan)))
        return plans

    @property
    def num_undelivered(self) -> int:
        return max(len(results) for results in self.results.values())

    def deliver(self, rank: int) -> None:
        """Hands the oldest result of a rank to the scheduler."""
        step, tokens = self.results[rank].popleft()
        self.take(self.scheduler.complete(rank, step, tokens))

    def deliver_step(self) -> None:
        for rank, results in self.results.items():
            if results:
                self.deliver(rank)

    def lose(self, *lost: int) -> None:
        """Loses ranks, with what they had not delivered, and begins an epoch with others in their place."""
        for rank in lost:
            self._make_rank(rank)
        self.scheduler.change_ranks(self.ranks, [rank for rank in self.ranks if rank not in lost])

    def run(self, max_steps: int = 5000) -> None:
        """Runs to the end of all requests, as far ahead as the scheduler goes."""
        for _ in range(max_steps):
            while self.schedule() is not None:
                pass
            if not self.num_undelivered:
                break
            self.deliver_step()
        assert not self.scheduler.has_requests, "requests are live, yet there is nothing to do"
        self.assert_clean()

    def assert_clean(self) -> None:
        load = self.scheduler.load()
        assert load.global_pages_used == load.chunked_pages_used == 0, "pages leaked"
        assert load.num_running == load.num_queued == 0
        assert all(client.ended for client in self.clients.values())
