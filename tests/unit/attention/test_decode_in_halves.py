"""Decode steps run as two halves in turn, their experts in another thread, against the same steps run whole."""

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any

import pytest
import torch

from actors.attention import worker
from actors.attention.local_model import LocalModel
from actors.attention.model import run_in_turn
from actors.dispatch.contract import build_routing_table
from actors.dispatch.micro_batches import MicroBatches, room_of_half
from actors.dispatch.peer_memory import SharedMemory
from actors.dispatch.rows import TokenShape
from actors.dispatch.symmetric import SymmetricDispatch
from actors.types import Admission, RankPlan, SampledToken, SamplingParams, Work

CPU = torch.device("cpu")
SEATS, PAGE, PROMPT_TOKENS, OUTPUT_TOKENS = 24, 4, 3, 14
MOST_WHOLE_ROWS = 16


def plans(case: object, num_requests: int) -> Iterator[RankPlan]:
    """Prompts by one step each, then all of them decode together, across pages and a chunk's end."""
    next_page = 0

    def piece(idx: int, start: int, num_tokens: int) -> Work:
        nonlocal next_page
        num_pages = -(-(start + num_tokens) // PAGE) - -(-start // PAGE)
        pages = tuple(range(next_page, next_page + num_pages))
        next_page += num_pages
        return Work(
            request_idx=idx, start=start, num_tokens=num_tokens, samples=True, global_pages=pages, chunked_pages=pages
        )

    for idx in range(num_requests):
        prompt = case.prompts[idx % 3][idx : idx + PROMPT_TOKENS]  # type: ignore[attr-defined]
        admission = Admission(
            request_idx=idx, prompt_ids=prompt, output_ids=(), sampling=SamplingParams(max_tokens=99, temperature=0.0)
        )
        yield RankPlan(admitted=(admission,), work=(piece(idx, 0, PROMPT_TOKENS),))
    for start in range(PROMPT_TOKENS, PROMPT_TOKENS + OUTPUT_TOKENS):
        yield RankPlan(work=tuple(piece(idx, start, 1) for idx in range(num_requests)))


class Halves:
    """A model's attention as rank 0 of two, its experts as rank 1, which serves in a thread."""

    def __init__(self, model: LocalModel) -> None:
        config, shape = model.config, TokenShape(
            hidden=model.config.hidden_size, experts_per_token=model.config.experts_per_token,
            dtype=torch.float32, device=CPU,
        )  # fmt: skip
        every = tuple(range(config.num_experts))
        routing = build_routing_table(
            {1: dict.fromkeys(config.moe_layers, every)}, config.moe_layers, config.num_experts, CPU
        )
        self.dispatch, self._served = (
            MicroBatches(
                *(
                    SymmetricDispatch(
                        memory,
                        routing,
                        model.experts,
                        (0,),
                        shape,
                        20.0,
                        room_of_half(SEATS, MOST_WHOLE_ROWS),
                        f"half {i}",
                    )
                    for i in (1, 2)
                ),
                SEATS,
                MOST_WHOLE_ROWS,
            )
            for memory in SharedMemory.of_world(2, CPU)
        )
        self.dispatch.start()
        self._served.start()
        model.attention.start_epoch(self.dispatch, brings_tokens=(True, False))
        self._attention = model.attention
        self._counts: SimpleQueue[int] = SimpleQueue()
        self._thread = Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while num_tokens := self._counts.get():
            self._served.serve_step((num_tokens, 0))

    def step(self, plan: RankPlan) -> list[SampledToken]:
        num_tokens = sum(work.num_tokens for work in plan.work)
        self._counts.put(num_tokens)
        self.dispatch.begin_step((num_tokens, 0))
        return self._attention.step(plan)

    def stop(self) -> None:
        self._counts.put(0)
        self._thread.join(5.0)


@pytest.mark.parametrize("variant", ["maverick", "top2"])
@pytest.mark.parametrize("num_requests", [MOST_WHOLE_ROWS, 21])
def test_halves_give_the_tokens_of_the_whole(
    make_case: Callable, variant: str, num_requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """21 rows are run as 24: 16 of them, then 5 and the padding."""
    case = make_case(variant)
    plain = case.load(max_num_seqs=SEATS, max_model_len=80)
    monkeypatch.setattr(worker, "uses_kernels", lambda *_: True)
    model = case.load(
        max_num_seqs=SEATS, max_model_len=80, layout="disaggregated", micro_batches=2, micro_batch_rows=MOST_WHOLE_ROWS
    )
    halves = Halves(model)
    num_divided = num_whole_dispatches = 0

    def dispatch_whole(*args: Any) -> Any:
        nonlocal num_whole_dispatches
        num_whole_dispatches += 1
        return MicroBatches.dispatch(halves.dispatch, *args)

    monkeypatch.setattr(halves.dispatch, "dispatch", dispatch_whole)
    for plan in plans(case, num_requests):
        assert halves.step(plan) == plain.attention.step(plan)
        num_divided += halves.dispatch.is_divided
    halves.stop()
    assert num_whole_dispatches == num_requests * len(model.config.moe_layers), "decode steps know of the halves"
    assert num_divided == (OUTPUT_TOKENS if num_requests > MOST_WHOLE_ROWS else 0)


def test_runs_take_turns_at_their_stops() -> None:
    said: list[str] = []

    def run(name: str) -> Iterator[None]:
        for i in range(2):
            said.append(f"{name}{i}")
            yield
        said.append(f"{name} ends")
        return torch.tensor(ord(name))

    ends = run_in_turn([run("a"), run("b")])  # type: ignore[list-item]
    assert [int(end) for end in ends] == [ord("a"), ord("b")]
    assert said == ["a0", "b0", "a1", "b1", "a ends", "b ends"]
