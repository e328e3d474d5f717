"""Captured steps as the device runs them (without the graph) against the same steps computed row by row."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from actors.attention import worker
from actors.attention.captured import Shape, sizes_of_prompts, sizes_of_singles
from actors.attention.local_model import LocalModel
from actors.errors import ConfigError
from actors.router.limits import SchedulerLimits
from actors.router.scheduler import RankPages, Scheduler
from actors.types import RankPlan, Request, SampledToken, SamplingParams

CHUNK, PAGE, SEATS = 16, 4, 6


def plans_of(model: LocalModel, requests: list[Request], answer: Callable[[RankPlan], list[SampledToken]]) -> int:
    """Runs the requests under the real scheduler, few pages at a time; returns the number of preemptions."""
    limits = SchedulerLimits(
        max_model_len=80, max_num_batched_tokens=24, max_num_seqs=SEATS, max_queued_requests=99, page_tokens=PAGE,
        chunk_tokens=CHUNK, max_steps_in_flight=1,
    )  # fmt: skip
    pools = model.pools
    scheduler = Scheduler(limits, {0: RankPages(min(pools.global_pages, 26), min(pools.chunked_pages, 22))})
    waiting = list(requests)
    while waiting or scheduler.has_requests:
        while waiting and scheduler.load().num_queued < 2:
            scheduler.submit(waiting.pop(), b"", 0.0)
        plans = scheduler.schedule(0.0)
        if plans is not None:
            scheduler.complete(0, scheduler.load().num_steps, answer(plans[0]))
    return scheduler.load().num_preemptions


@pytest.fixture
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(worker, "uses_kernels", lambda *_: True)
    yield


@pytest.mark.parametrize("variant", ["maverick", "scout", "top2"])
def test_captured_steps_give_the_tokens_of_others(
    make_case: Callable, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random requests under the real scheduler: admissions, chunks that turn, preemption, seats used again."""
    case = make_case(variant)
    plain = case.load(max_num_seqs=SEATS, max_model_len=80)
    monkeypatch.setattr(worker, "uses_kernels", lambda *_: True)
    ours = case.load(max_num_seqs=SEATS, max_model_len=80)
    captured = ours.attention._captured
    assert captured is not None and plain.attention._captured is None
    runs = {False: 0, True: 0}
    original = captured._forward

    def counted(shape: Shape, *args: Any) -> Any:
        runs[shape.has_prompts] += 1
        return original(shape, *args)

    monkeypatch.setattr(captured, "_forward", counted)
    draw = random.Random(3)
    requests = [
        Request(
            request_id=str(i),
            prompt_ids=case.prompts[i % 3][: draw.choice((1, 3, 7, 9, 12, 15, 16, 17, 40))],
            sampling=SamplingParams(
                max_tokens=draw.choice((1, 20, 35)), temperature=draw.choice((0.0, 0.8)), seed=i,
                repetition_penalty=draw.choice((1.0, 1.2)),
            ),
        )
        for i in range(24)
    ]  # fmt: skip

    def answer(plan: RankPlan) -> list[SampledToken]:
        expected = plain.attention.step(plan)
        assert ours.attention.step(plan) == expected
        return expected

    assert plans_of(plain, requests, answer) > 0, "the pages were to run out"
    assert runs[False] > 30
    assert runs[True] > 8


@pytest.mark.usefixtures("on_the_device")
def test_padding_rows_change_nothing(make_case: Callable) -> None:
    """A batch of 5 runs as 8 rows: keys, page tables and counts of tokens by expert are those of 5."""
    case = make_case("maverick")
    model = case.load(max_num_seqs=8, max_model_len=80)
    requests = [
        Request(request_id=str(i), prompt_ids=case.prompts[0][: 9 + i], sampling=SamplingParams(max_tokens=4))
        for i in range(5)
    ]
    num_tokens = 0

    def answer(plan: RankPlan) -> list[SampledToken]:
        nonlocal num_tokens
        num_tokens += sum(work.num_tokens for work in plan.work)
        return model.attention.step(plan)

    plans_of(model, requests, answer)
    model.attention.request_expert_tokens()
    assert all(sum(counts) == num_tokens for counts in model.attention.take_expert_tokens().values())


@pytest.mark.usefixtures("on_the_device")
def test_more_requests_than_a_gpu_decodes_are_refused_by_name(make_case: Callable) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        make_case("maverick").load(max_num_seqs=1025, max_model_len=80)


def test_the_buckets_hold_every_batch() -> None:
    for most in (1, 2, 3, 8, 100, 256, 700):
        sizes = sizes_of_singles(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        assert all(b <= 2 * a or b - a <= 8 for a, b in itertools.pairwise(sizes))
    assert torch.tensor(sizes_of_singles(256)).diff().max() <= 16


def test_the_buckets_of_steps_with_prompts_waste_little() -> None:
    assert sizes_of_prompts(0) == []
    for most in (24, 32, 100, 1000, 2048):
        sizes = sizes_of_prompts(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        assert all(b - a <= max(64, a / 2) for a, b in itertools.pairwise(sizes))
