"""A rank over its real sockets: whom it obeys, that it always answers, and when it ends."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from actors.attention.model import AttentionModel
from actors.checkpoint.shape_models import ensure_shape_model
from actors.config import PipelineConfig
from actors.errors import RankError
from actors.rank import Rank
from actors.rank_loop import RankLoop
from actors.types import (
    Admission,
    Alive,
    Attach,
    Attached,
    Beat,
    Epoch,
    Failed,
    Join,
    Joined,
    Leave,
    Load,
    Loaded,
    Prepare,
    Prepared,
    Progress,
    RankEndpoints,
    RankPlan,
    RankSpec,
    SamplingParams,
    StepPlan,
    StepResult,
    Work,
)
from actors.wire import FROM_RANK, TO_RANK, open_socket

SLOTS = {layer: tuple(range(8)) for layer in (1, 3, 5, 7)}
SPEC = RankSpec(rank=4, roles=("attention", "expert"), slots=SLOTS)
PROMPT = (5, 6, 7)


@dataclass
class Router:
    """One router's two sockets to a rank."""

    endpoints: RankEndpoints
    name: bytes
    context: zmq.Context[Any] = field(default_factory=zmq.Context)

    def __post_init__(self) -> None:
        self.sockets = {}
        for kind, endpoint in (("control", self.endpoints.control), ("steps", self.endpoints.steps)):
            self.sockets[kind] = open_socket(self.context, zmq.DEALER)
            self.sockets[kind].setsockopt(zmq.IDENTITY, self.name)
            self.sockets[kind].connect(endpoint)

    def tell(self, message: Any) -> None:
        kind = "steps" if isinstance(message, Join | StepPlan) else "control"
        self.sockets[kind].send(TO_RANK.encode(message))

    def hear(self, kind: str = "control", timeout_s: float = 30.0) -> Any:
        """The next answer but Progress; None if none comes."""
        while self.sockets[kind].poll(timeout_s * 1e3):
            message = FROM_RANK.decode(self.sockets[kind].recv())
            if not isinstance(message, Progress):
                return message
        return None

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    model = ensure_shape_model("tiny", tmp_path_factory.mktemp("models"))
    return PipelineConfig(model=str(model), kv_cache_bytes=8 << 20, max_model_len=256, lease_s=20.0)


@pytest.fixture
def rank() -> Iterator[tuple[RankEndpoints, threading.Thread, RankLoop]]:
    loop = RankLoop(Rank(4, torch.device("cpu"), "127.0.0.1"), lease_s=20.0)
    endpoints = loop.start()
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield endpoints, thread, loop
    loop.stop()
    thread.join(10)
    assert not thread.is_alive()


def load(pipeline: PipelineConfig, epoch: int, spec: RankSpec = SPEC) -> Load:
    return Load(epoch=epoch, spec=spec, pipeline=pipeline.as_dict())


def step(epoch: int, number: int, *, first: bool, sequence: int = 0) -> StepPlan:
    """The first computes the prompt, later ones the token before. The epoch's plan number `sequence`, or `number`."""
    start, size = (0, len(PROMPT)) if first else (len(PROMPT) + number - 2, 1)
    pages = (0,) if first else ()
    work = Work(request_idx=0, start=start, num_tokens=size, samples=True, global_pages=pages, chunked_pages=pages)
    sampling = SamplingParams(max_tokens=50, temperature=0.0)
    admission = Admission(request_idx=0, prompt_ids=PROMPT, output_ids=(), sampling=sampling)
    plan = RankPlan(admitted=(admission,) if first else (), work=(work,))
    return StepPlan(epoch=epoch, step=number, sequence=sequence or number, tokens_of_rank=(size,), rank_plan=plan)


def bring_up(router: Router, pipeline: PipelineConfig, number: int, *, fresh: bool) -> None:
    epoch = Epoch(epoch=number, ranks=(SPEC,), endpoints=(router.endpoints.steps,))
    for message, kind, answer in (
        (load(pipeline, number), "control", Loaded),
        (Prepare(epoch=epoch), "control", Prepared),
        (Join(epoch=number, fresh=fresh), "steps", Joined),
    ):
        router.tell(message)
        got = router.hear(kind)
        assert isinstance(got, answer) and got.epoch == number, got


def test_a_step_that_failed_runs_again_in_the_next_epoch_but_is_taken_in_once(
    rank: tuple[RankEndpoints, threading.Thread, RankLoop], pipeline: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = Router(rank[0], b"router")
    router.tell(Attach(term=1))
    assert router.hear() == Attached(rank=4, spec=None)

    def tokens_of(epoch: int, numbers: Sequence[int]) -> list[int]:
        tokens = []
        for sequence, number in enumerate(numbers, 1):
            router.tell(step(epoch, number, first=number == 1, sequence=sequence))
            result = router.hear("steps")
            assert isinstance(result, StepResult) and (result.epoch, result.step) == (epoch, number), result
            tokens.append(result.tokens[0].token_id)
        return tokens

    bring_up(router, pipeline, 10, fresh=True)
    undisturbed = tokens_of(10, range(1, 6))
    bring_up(router, pipeline, 11, fresh=True)
    tokens = tokens_of(11, range(1, 4))

    def lose_a_peer(*_: object) -> None:
        monkeypatch.undo()
        raise RankError(7, "lost in the midst of the step")

    monkeypatch.setattr(AttentionModel, "forward", lose_a_peer)
    router.tell(step(11, 4, first=False))
    failed = router.hear("steps")
    assert isinstance(failed, Failed) and "midst" in failed.problem
    router.tell(step(11, 5, first=False))
    assert router.hear("steps", 0.5) is None, "a plan of an epoch that is over"
    bring_up(router, pipeline, 12, fresh=False)
    assert tokens + tokens_of(12, (4, 5)) == undisturbed, "its requests, pages and tokens are still there"
    router.tell(Leave(epoch=12))
    router.tell(Beat())
    alive = router.hear()
    assert isinstance(alive, Alive) and alive.rank == 4
    router.tell(step(12, 6, first=False))
    assert router.hear("steps", 0.5) is None
    router.close()


def test_a_plan_that_was_lost_ends_the_epoch_for_the_rank_and_its_requests_go_on(
    rank: tuple[RankEndpoints, threading.Thread, RankLoop], pipeline: PipelineConfig
) -> None:
    router = Router(rank[0], b"router")
    router.tell(Attach(term=1))
    router.hear()
    bring_up(router, pipeline, 10, fresh=True)
    router.tell(step(10, 1, first=True))
    assert isinstance(router.hear("steps"), StepResult)
    router.tell(step(10, 3, first=False))
    failed = router.hear("steps")
    assert isinstance(failed, Failed) and "1 plans before step 3 did not arrive" in failed.problem
    bring_up(router, pipeline, 11, fresh=False)
    for number in (2, 3):
        router.tell(step(11, number, first=False, sequence=number - 1))
        result = router.hear("steps")
        assert isinstance(result, StepResult) and result.step == number
    router.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it ends so
def test_a_rank_whose_answer_was_lost_ends(
    rank: tuple[RankEndpoints, threading.Thread, RankLoop], pipeline: PipelineConfig
) -> None:
    """It has gone on from the token that nobody heard; its requests are computed again elsewhere."""
    endpoints, thread, _ = rank
    router = Router(endpoints, b"router")
    router.tell(Attach(term=1))
    router.hear()
    bring_up(router, pipeline, 10, fresh=True)
    router.tell(step(10, 1, first=True))
    assert isinstance(router.hear("steps"), StepResult)
    bring_up(router, pipeline, 11, fresh=False)
    router.tell(step(11, 1, first=True))
    failed = router.hear("steps")
    assert isinstance(failed, Failed) and "answer to step 1 was lost" in failed.problem
    thread.join(10)
    assert not thread.is_alive()
    router.close()


def test_the_router_with_the_highest_term_is_obeyed(
    rank: tuple[RankEndpoints, threading.Thread, RankLoop], pipeline: PipelineConfig
) -> None:
    old, stale, new = (Router(rank[0], name) for name in (b"old", b"stale", b"new"))
    old.tell(Beat())
    assert old.hear(timeout_s=0.3) is None, "nobody has attached"
    old.tell(Attach(term=5))
    assert isinstance(old.hear(), Attached)
    bring_up(old, pipeline, 10, fresh=True)
    stale.tell(Attach(term=4))
    assert stale.hear(timeout_s=0.3) is None
    new.tell(Attach(term=6))
    attached = new.hear()
    assert attached.spec == SPEC
    old.tell(Beat())
    old.tell(step(10, 1, first=True))
    assert old.hear(timeout_s=0.3) is None and old.hear("steps", 0.3) is None
    new.tell(Beat())
    assert new.hear() == Alive(rank=4)
    for router in (old, stale, new):
        router.close()


def test_the_next_router_may_want_another_pipeline(
    rank: tuple[RankEndpoints, threading.Thread, RankLoop], pipeline: PipelineConfig
) -> None:
    """The application was deployed again with other keys: the epoch of the router before is no reason to refuse."""
    old, new = Router(rank[0], b"old"), Router(rank[0], b"new")
    old.tell(Attach(term=1))
    old.hear()
    bring_up(old, pipeline, 10, fresh=True)
    new.tell(Attach(term=2))
    new.hear()
    bring_up(new, replace(pipeline, kv_cache_bytes=4 << 20), 11, fresh=True)
    new.tell(step(11, 1, first=True))
    assert isinstance(new.hear("steps"), StepResult)
    old.close()
    new.close()


def test_beats_are_answered_while_it_loads_and_a_bad_load_harms_nothing(
    rank: tuple[RankEndpoints, threading.Thread, RankLoop], pipeline: PipelineConfig, tmp_path: Path
) -> None:
    router = Router(rank[0], b"router")
    router.tell(Attach(term=1))
    router.hear()
    bring_up(router, pipeline, 10, fresh=True)
    router.tell(load(pipeline, 11, RankSpec(rank=4, roles=SPEC.roles, slots={1: (1, 0, 2, 3, 4, 5, 6, 7)})))
    router.tell(Beat())
    answers = {type(router.hear()) for _ in range(2)}
    assert answers == {Alive, Failed}, "slots that serve do not change"
    router.tell(step(10, 1, first=True))
    assert isinstance(router.hear("steps"), StepResult)
    router.close()


def test_a_rank_ends_when_nobody_renews_its_lease() -> None:
    loop = RankLoop(Rank(4, torch.device("cpu"), "127.0.0.1"), lease_s=1.0)
    router = Router(loop.start(), b"router")
    thread = threading.Thread(target=loop.run)
    began_s = time.monotonic()
    thread.start()
    router.tell(Attach(term=1))
    for _ in range(5):
        time.sleep(0.4)
        router.tell(Beat())
    assert thread.is_alive()
    thread.join(5)
    assert not thread.is_alive() and time.monotonic() - began_s > 2.9
    router.close()
