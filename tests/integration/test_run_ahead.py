"""A rank that runs ahead launches a step while the one before it runs, and answers them in their order."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import zmq

from actors.errors import RankError
from actors.rank_loop import RankLoop
from actors.types import (
    Attach,
    Attached,
    Epoch,
    Failed,
    Join,
    Joined,
    Prepare,
    Prepared,
    RankEndpoints,
    RankPlan,
    StepPlan,
    StepResult,
)
from actors.wire import FROM_RANK, TO_RANK, open_socket


@dataclass
class Step:
    plan: StepPlan
    finished: threading.Event = field(default_factory=threading.Event)

    @property
    def is_done(self) -> bool:
        return self.finished.is_set()


@dataclass
class SlowDevice:
    """What RankLoop needs of a Rank; its steps end when the test says so."""

    rank: int = 0
    address: str = "127.0.0.1"
    keys: None = None
    experts: None = None
    spec: None = None
    contents: str = ""
    runs_ahead: bool = True
    fails_at: int = -1
    pace: None = None
    launched: list[Step] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    is_prepared: threading.Event = field(default_factory=threading.Event)

    def launch(self, plan: StepPlan) -> Step:
        if plan.step == self.fails_at:
            raise RankError(5, "lost")
        self.launched.append(Step(plan))
        self.log.append(f"launch {plan.step}")
        return self.launched[-1]

    def finish(self, step: Step) -> StepResult:
        assert step.finished.wait(10)
        self.log.append(f"finish {step.plan.step}")
        return StepResult(rank=0, epoch=step.plan.epoch, step=step.plan.step, tokens=(), elapsed_us=1)

    def join(self, epoch: int, fresh: bool) -> None:
        self.log.append(f"join {epoch}")

    def prepare(self, epoch: Epoch, hurries: bool) -> None:
        assert self.is_prepared.wait(10)
        self.log.append("prepared")

    def use_idle_time(self) -> bool:
        self.log.append("idle")
        return False

    def supersede(self, epoch: int) -> None: ...

    def stop(self) -> None: ...

    def interrupt(self, epoch: int | None = None) -> None: ...


@dataclass
class Running:
    device: SlowDevice
    control: zmq.Socket[Any]
    steps: zmq.Socket[Any]

    def plan(self, number: int) -> None:
        message = StepPlan(epoch=1, step=number, sequence=number, tokens_of_rank=(1,), rank_plan=RankPlan())
        self.steps.send(TO_RANK.encode(message))

    def hear(self, timeout_s: float = 10.0) -> Any:
        return FROM_RANK.decode(self.steps.recv()) if self.steps.poll(timeout_s * 1e3) else None

    def until(self, entry: str) -> None:
        for _ in range(1000):
            if entry in self.device.log:
                return
            threading.Event().wait(0.005)
        raise AssertionError(f"{entry} not in {self.device.log}")


@pytest.fixture
def running() -> Iterator[Running]:
    device = SlowDevice()
    loop = RankLoop(device, lease_s=30.0)  # type: ignore[arg-type]
    endpoints: RankEndpoints = loop.start()
    thread = threading.Thread(target=loop.run)
    thread.start()
    context: zmq.Context[Any] = zmq.Context()
    sockets = []
    for endpoint in (endpoints.control, endpoints.steps):
        sockets.append(open_socket(context, zmq.DEALER))
        sockets[-1].setsockopt(zmq.IDENTITY, b"router")
        sockets[-1].connect(endpoint)
    sockets[0].send(TO_RANK.encode(Attach(term=1)))
    assert isinstance(FROM_RANK.decode(sockets[0].recv()), Attached)
    yield Running(device, *sockets)
    for step in device.launched:
        step.finished.set()
    loop.stop()
    thread.join(10)
    context.destroy(linger=0)


def test_a_step_is_launched_while_the_one_before_it_runs(running: Running) -> None:
    for number in (1, 2, 3):
        running.plan(number)
    running.until("launch 2")
    assert running.hear(0.2) is None and "launch 3" not in running.device.log, "two steps at most"
    running.device.launched[0].finished.set()
    assert running.hear().step == 1
    running.until("launch 3")
    for step in list(running.device.launched):
        step.finished.set()
    assert [running.hear().step, running.hear().step] == [2, 3]


def test_a_join_waits_for_what_was_launched(running: Running) -> None:
    running.plan(1)
    running.until("launch 1")
    running.steps.send(TO_RANK.encode(Join(epoch=2, fresh=True)))
    running.device.launched[0].finished.set()
    assert isinstance(running.hear(), StepResult) and isinstance(running.hear(), Joined)
    assert [entry for entry in running.device.log if entry != "idle"] == ["launch 1", "finish 1", "join 2"]


def test_a_step_that_cannot_be_launched_is_told_after_the_answers_before_it(running: Running) -> None:
    running.device.fails_at = 2
    running.plan(1)
    running.plan(2)
    running.until("launch 1")
    threading.Timer(0.2, lambda: running.device.launched[0].finished.set()).start()
    assert running.hear().step == 1
    failed = running.hear()
    assert isinstance(failed, Failed) and failed.epoch == 1


def test_idle_time_is_not_used_beside_a_task(running: Running) -> None:
    """A capture would be void where what is prepared waits for the whole device."""
    running.until("idle")
    running.control.send(TO_RANK.encode(Prepare(epoch=Epoch(epoch=2, ranks=()))))
    assert running.control.poll(300) == 0
    running.device.log.clear()
    assert running.control.poll(500) == 0 and running.device.log == [], "more than two polls of a loop without steps"
    running.device.is_prepared.set()
    assert isinstance(FROM_RANK.decode(running.control.recv()), Prepared)
    running.until("idle")
    assert running.device.log[0] == "prepared"
