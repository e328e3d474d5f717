"""Captured steps as the device runs them, against plain ones, over work that no scheduler would think of."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from actors.attention import worker
from actors.attention.captured import CapturedSteps
from actors.attention.local_model import LocalModel
from actors.attention.logits import Logits
from actors.attention.requests import RequestTable
from actors.types import Admission, RankPlan, SamplingParams, Work

CHUNK, PAGE, SEATS, BUDGET = 16, 4, 7, 96
LENGTHS = (1, 2, 3, 4, 5, 15, 16, 17, 23, 24, 25, 31, 32, 48, 60)
TOLERANCE = 1e-3


@dataclass
class Held:
    """A running request: tokens known or sampled, those computed, and its pages by group (None once freed)."""

    num_tokens: int
    longest: int
    done: int = 0
    pages: tuple[list[int], list[int | None]] = field(default_factory=lambda: ([], []))


class AnyRouter:
    """Random admissions, pieces, orders, pages and preemptions; pages that nobody has are full of NaN in `poisoned`."""

    def __init__(self, models: Sequence[LocalModel], prompts: Sequence[Sequence[int]], seed: int) -> None:
        self.draw = random.Random(seed)
        self._models, self._prompts = models, prompts
        pools = models[0].pools
        # About as many as all need, so that pages go from one to another at once.
        self._free = [list(range(min(num, 90))) for num in (pools.global_pages, pools.chunked_pages)]
        for free in self._free:
            self.draw.shuffle(free)
        self.running: dict[int, Held] = {}
        self._next_idx = 0
        for group in (0, 1):
            self._poison(group, self._free[group])

    def plan(self) -> RankPlan:
        released = tuple(idx for idx in list(self.running) if self._ends(idx))
        admitted = tuple(self._admit() for _ in range(self.draw.randrange(3)) if len(self.running) < SEATS)
        work, left = [], BUDGET
        idxs = list(self.running)
        self.draw.shuffle(idxs)
        for idx in idxs:
            item = self._work(idx, left) if self.draw.random() < 0.85 else None
            if item is not None:
                work.append(item)
                left -= item.num_tokens
        return RankPlan(released=released, admitted=admitted, work=tuple(work))

    def done(self, plan: RankPlan) -> None:
        """The plan was run: chunks that are over are given back."""
        for item in plan.work:
            held = self.running[item.request_idx]
            held.done += item.num_tokens
            held.num_tokens += item.samples
            table = held.pages[1]
            dead = [page for page in table[: held.done // CHUNK * (CHUNK // PAGE)] if page is not None]
            table[: held.done // CHUNK * (CHUNK // PAGE)] = [None] * (held.done // CHUNK * (CHUNK // PAGE))
            self._give_back(1, dead)

    def _ends(self, idx: int) -> bool:
        held = self.running[idx]
        if held.num_tokens < held.longest and self.draw.random() > 0.03:
            return False
        for group in (0, 1):
            self._give_back(group, [page for page in held.pages[group] if page is not None])
        del self.running[idx]
        return True

    def _admit(self) -> Admission:
        """With outputs sometimes, as after a preemption."""
        num_prompt, num_outputs = self.draw.choice(LENGTHS), self.draw.choice((0, 0, 3))
        ids, idx = tuple(self.draw.choice(self._prompts)[: num_prompt + num_outputs]), self._next_idx
        self._next_idx = (idx + 1) % 1000
        self.running[idx] = Held(len(ids), len(ids) + self.draw.choice((1, 2, 9)))
        sampling = SamplingParams(max_tokens=99, temperature=0.0)
        return Admission(request_idx=idx, prompt_ids=ids[:num_prompt], output_ids=ids[num_prompt:], sampling=sampling)

    def _work(self, idx: int, left: int) -> Work | None:
        held = self.running[idx]
        num_tokens = min(left, held.num_tokens - held.done, self.draw.choice((1, 2, 5, 16, 24, 99)))
        if self.draw.random() < 0.7:  # else pieces go beyond chunks, which are not captured
            num_tokens = min(num_tokens, CHUNK - held.done % CHUNK)
        end = held.done + num_tokens
        num_pages = -(-end // PAGE) - len(held.pages[0])
        if num_tokens < 1 or num_pages > min(map(len, self._free)):
            return None
        granted = [[self._free[group].pop() for _ in range(num_pages)] for group in (0, 1)]
        for group in (0, 1):
            held.pages[group].extend(granted[group])  # type: ignore[arg-type]
        return Work(
            request_idx=idx, start=held.done, num_tokens=num_tokens, samples=end == held.num_tokens,
            global_pages=tuple(granted[0]), chunked_pages=tuple(granted[1]),
        )  # fmt: skip

    def _give_back(self, group: int, pages: Sequence[int]) -> None:
        self._free[group] += pages
        self.draw.shuffle(self._free[group])
        self._poison(group, pages)

    def _poison(self, group: int, pages: Sequence[int]) -> None:
        for model in self._models:
            cache = model.attention.cache
            assert cache is not None
            kept = cache.chunked_LPSHd if group else cache.global_LPSHd
            if kept.shape[0]:
                kept[:, list(pages)] = float("nan")


def logits_of(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Those of the rows that are sampled, step by step, as they come."""
    found: list[Tensor] = []
    original = model.attention._sample

    def sample(idxs: Sequence[int], logits: Logits, rows_B: Tensor) -> object:
        found.append(logits.part_BC.clone())
        return original(idxs, logits, rows_B)

    monkeypatch.setattr(model.attention, "_sample", sample)
    return found


def empty_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has written is not finite: padding may be, and nothing else may see it."""
    original = Tensor.new_empty

    def new_empty(tensor: Tensor, *shape: object, **keys: object) -> Tensor:
        made: Tensor = original(tensor, *shape, **keys)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


@pytest.mark.parametrize("variant", ["maverick", "scout", "top2"])
def test_any_work_gives_the_logits_and_the_keys_of_plain_steps(
    make_case: Callable, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(variant)
    settings = {"max_num_seqs": SEATS, "max_model_len": 80, "max_num_batched_tokens": BUDGET}
    plain = case.load(**settings)
    monkeypatch.setattr(worker, "uses_kernels", lambda *_: True)
    ours = case.load(**settings)
    captured = ours.attention._captured
    assert isinstance(captured, CapturedSteps)
    num_captured = {True: 0, False: 0}
    original = captured.run

    def run(work: Sequence[Work], requests: RequestTable, most_rows: int) -> tuple[Logits, Tensor]:
        num_captured[any(not item.samples or item.num_tokens > 1 for item in work)] += 1
        return original(work, requests, most_rows)

    monkeypatch.setattr(captured, "run", run)
    empty_memory_is_nan(monkeypatch)
    found, expected = logits_of(ours, monkeypatch), logits_of(plain, monkeypatch)
    router = AnyRouter((plain, ours), case.prompts, seed=11)
    num_tokens = 0
    for _ in range(80):
        plan = router.plan()
        tokens = [model.attention.step(plan) for model in (plain, ours)]
        assert tokens[0] == tokens[1]
        num_tokens += sum(item.num_tokens for item in plan.work)
        assert len(found) == len(expected)
        for logits_BC, wanted_BC in zip(found, expected, strict=True):
            torch.testing.assert_close(logits_BC, wanted_BC, rtol=0, atol=TOLERANCE)
        found.clear(), expected.clear()
        for name in ("global_LPSHd", "chunked_LPSHd"):
            kept, wanted = (getattr(model.attention.cache, name) for model in (ours, plain))
            is_unwritten = kept.isnan() & (wanted == 0)  # plain steps clear pages before they write to them
            torch.testing.assert_close(
                kept.masked_fill(is_unwritten, 0), wanted, rtol=0, atol=TOLERANCE, equal_nan=True
            )
        router.done(plan)
    assert num_captured[True] > 30 and num_captured[False] > 3, num_captured
    for model in (plain, ours):
        model.attention.request_expert_tokens()
        assert all(sum(of) == num_tokens * model.config.experts_per_token
                   for of in model.attention.take_expert_tokens().values())  # fmt: skip
