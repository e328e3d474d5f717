"""Large steps in parts: where they are cut, and that two ranks which share memory answer as the model does."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.attention import parts
from actors.attention.parts import divide
from actors.attention.worker import AttentionWorker
from actors.checkpoint.config import read_model_config
from actors.config import PipelineConfig
from actors.dispatch.group import EpochGroup, RendezvousStore
from actors.dispatch.peer_memory import SharedMemory
from actors.dispatch.replicated import ReplicatedDispatch
from actors.dispatch.rows import TokenShape
from actors.dispatch.tensor_parallel import MOST_SUMMED_ROWS, OverPeerMemory
from actors.expert.worker import ExpertWorker
from actors.types import Admission, RankPlan, SamplingParams, Work

CPU = torch.device("cpu")
TOLERANCE = 1e-3
TIMEOUT_S = 20.0


def work_of(*sizes: int, start: int = 0) -> list[Work]:
    return [
        Work(request_idx=i, start=start, num_tokens=size, samples=True, global_pages=(i,))
        for i, size in enumerate(sizes)
    ]


def spans(part: Sequence[Work]) -> list[tuple[int, int, int, bool]]:
    return [(w.request_idx, w.start, w.start + w.num_tokens, w.samples) for w in part]


@pytest.fixture(autouse=True)
def _sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MIN_DIVIDED_ROWS", 2048)
    monkeypatch.setattr(parts, "PART_ROWS", 2048)
    monkeypatch.setattr(parts, "MAX_PARTS", 3)


def test_small_steps_are_one_part() -> None:
    work = work_of(1, 2000)
    assert divide(work) == [work]


def test_pieces_stay_whole_where_halves_are_about_equal() -> None:
    first, second = divide(work_of(1, 1, 1000, 1100, 900, 1000))
    assert [w.num_tokens for w in first] == [1, 1, 1000, 1100] and [w.num_tokens for w in second] == [900, 1000]


def test_a_long_piece_is_cut_where_attention_is_fast() -> None:
    first, second = divide(work_of(3, 4000, start=100))
    assert spans(first) == [(0, 100, 103, True), (1, 100, 2048, False)]
    assert spans(second) == [(1, 2048, 4100, True)]
    assert first[1].global_pages == (1,) and second[0].global_pages == (), "pages are granted once"


@pytest.mark.parametrize(
    ("sizes", "num_parts"),
    [
        ((2048,), 2), ((1, 2047), 2), ((5000, 1), 2), ((700, 3000, 700), 2), ((3000, 700, 700), 2), ((9000,), 3),
        ((1024,) * 16, 3), ((1,) * 100 + (8000, 300), 3), ((300, 7000, 4000), 3),
    ],
)  # fmt: skip
def test_all_is_computed_once_in_its_order(sizes: tuple[int, ...], num_parts: int) -> None:
    divided = divide(work_of(*sizes))
    assert len(divided) == num_parts and all(divided)
    rows = [[(w.request_idx, w.start + t) for w in part for t in range(w.num_tokens)] for part in divided]
    assert [row for of_part in rows for row in of_part] == [(i, t) for i, size in enumerate(sizes) for t in range(size)]
    assert max(map(len, rows)) <= sum(sizes) / num_parts * 3 / 2
    assert sum(w.samples for part in divided for w in part) == len(sizes)


class Unit:
    """Two ranks of one attention unit, threads of this process that share memory as GPUs would."""

    def __init__(self, directory: Path, store: RendezvousStore) -> None:
        pipeline = PipelineConfig.parse({"model": str(directory), "kv_cache_bytes": 4 << 20, "page_tokens": 4})
        self.config = config = read_model_config(directory)
        shape = TokenShape(
            hidden=config.hidden_size, experts_per_token=config.experts_per_token, dtype=torch.float32, device=CPU
        )
        memories = SharedMemory.of_world(2, CPU)
        slots = {i: {layer: tuple(range(config.num_experts))[i::2] for layer in config.moe_layers} for i in range(2)}
        self.members = [OverPeerMemory(i, 2, shape, MOST_SUMMED_ROWS + 1, memories[i]) for i in range(2)]
        self.groups = [EpochGroup(CPU, "127.0.0.1") for _ in range(2)]
        self.workers: list[AttentionWorker] = []
        for i, member in enumerate(self.members):
            member.min_large_rows = 1
            worker = AttentionWorker.load(config, pipeline, CPU, tp=member)
            worker.allocate_cache()
            experts = ExpertWorker.load(config, pipeline, slots[i], CPU)
            worker.start_epoch(ReplicatedDispatch(experts, slots, config.moe_layers, config.num_experts, i, CPU))
            self.workers.append(worker)
        self.all(lambda i: self._join(i, store))

    def _join(self, i: int, store: RendezvousStore) -> None:
        self.groups[i].prepare(store.endpoint)
        self.groups[i].join(1, i, 2, TIMEOUT_S, TIMEOUT_S)
        self.members[i].join(self.groups[i], (0, 1), True)

    def all(self, work: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(work, range(2)))


@pytest.fixture
def store() -> Iterator[RendezvousStore]:
    store = RendezvousStore("127.0.0.1")
    store.start()
    yield store
    store.stop()


@pytest.mark.parametrize("part_rows", [8, 1000])
def test_two_ranks_answer_as_the_model_does(
    make_case: Callable[..., Any], store: RendezvousStore, monkeypatch: pytest.MonkeyPatch, part_rows: int
) -> None:
    """Prompts in steps of several requests, of which one is cut, and a step of single tokens among prompts."""
    monkeypatch.setattr(parts, "MIN_DIVIDED_ROWS", part_rows)
    monkeypatch.setattr(parts, "PART_ROWS", part_rows)
    monkeypatch.setattr(parts, "CUT_TOKENS", 4)
    case = make_case("maverick")
    unit = Unit(case.directory, store)
    steps = [{0: (0, 40), 1: (0, 9), 2: (0, 3)}, {0: (40, 41), 1: (9, 47), 2: (3, 4)}]
    admitted = tuple(
        Admission(request_idx=i, prompt_ids=prompt, output_ids=(), sampling=SamplingParams(max_tokens=9))
        for i, prompt in enumerate(case.prompts)
    )
    for step, spans in enumerate(steps):
        plan = RankPlan(admitted=() if step else admitted, work=tuple(work_at(i, *span) for i, span in spans.items()))
        logits = unit.all(lambda i: compute(unit.workers[i], plan))  # noqa: B023
        assert torch.equal(logits[0], logits[1])
        expected = torch.stack([case.logits[i][end - 1] for i, (_, end) in spans.items()])
        assert (logits[0] - expected).abs().max() < TOLERANCE


def work_at(request_idx: int, start: int, end: int) -> Work:
    """Pages of 4 tokens, 20 for each request."""
    pages = tuple(request_idx * 20 + page for page in range(-(-start // 4), -(-end // 4)))
    return Work(
        request_idx=request_idx, start=start, num_tokens=end - start, samples=True, global_pages=pages,
        chunked_pages=pages,
    )  # fmt: skip


def compute(worker: AttentionWorker, plan: RankPlan) -> Tensor:
    with torch.inference_mode():
        worker.take_in(plan)
        sampled, h_BD, memory_rows_B = worker._forward_in_parts(plan.work)
        assert sampled == tuple(work.request_idx for work in plan.work) and len(memory_rows_B) == len(sampled)
        return worker.logits(h_BD)
