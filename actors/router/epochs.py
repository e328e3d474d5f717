"""How a pipeline comes to serve, as a pure state machine: start, load, prepare, join, serve, and again after a loss.

Owns the phase of the membership and what must be said to whom next. Knows nothing of sockets, processes or requests:
the router tells it what happened and carries out the actions that it returns. Time is passed in, in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from actors.types import Epoch, Failed, Join, Joined, Load, Loaded, Prepare, Prepared, Progress, RankSpec, ToRank

RETRY_FIRST_S = 0.2
RETRY_MOST_S = 10.0


class Phase(Enum):
    STARTING = "starting ranks"
    LOADING = "loading weights"
    PREPARING = "preparing the epoch"
    JOINING = "joining the epoch"
    SERVING = "serving"
    WAITING = "waiting to try again"
    BROKEN = "cannot serve"


@dataclass(frozen=True, slots=True)
class StartRanks:
    """Have the fleet make sure that all ranks live; answer with `started` or `start_failed`."""


@dataclass(frozen=True, slots=True)
class Tell:
    rank: int
    message: ToRank


@dataclass(frozen=True, slots=True)
class BeginServing:
    epoch: Epoch
    loaded: dict[int, Loaded]


@dataclass(frozen=True, slots=True)
class EndEpoch:
    """Stop planning; requests that ran in the epoch have lost their ranks."""

    problem: str


Action = StartRanks | Tell | BeginServing | EndEpoch


class EpochMachine:
    """Drives one pipeline's membership. Every method returns the actions to carry out, in order."""

    def __init__(self, specs: Sequence[RankSpec], pipeline: dict[str, Any], store: str, join_timeout_s: float) -> None:
        self._specs = {spec.rank: spec for spec in specs}
        self._pipeline = pipeline
        self._store = store
        self._join_timeout_s = join_timeout_s
        self._waiting_for: set[int] = set()
        self._loaded: dict[int, Loaded] = {}
        self._progress: dict[int, tuple[int, int]] = {}
        self._phase_ends_s = float("inf")
        self._retry_s = RETRY_FIRST_S
        self._epoch_number = 0
        self.phase = Phase.WAITING
        self.problem = ""

    @property
    def epoch_number(self) -> int:
        return self._epoch_number

    @property
    def serving(self) -> bool:
        return self.phase is Phase.SERVING

    def detail(self) -> str:
        """One line for people: the phase, how far it is, and the last problem."""
        text = self.phase.value
        if self.phase is Phase.LOADING and self._progress:
            done, total = (sum(p[i] for p in self._progress.values()) for i in (0, 1))
            text += f", {done / 1e9:.2f} of {total / 1e9:.2f} GB"
        return f"{text} ({self.problem})" if self.problem and not self.serving else text

    def begin(self) -> list[Action]:
        self.phase, self._phase_ends_s = Phase.STARTING, float("inf")
        return [StartRanks()]

    def started(self) -> list[Action]:
        """All processes live: have each load what it must hold (at once, where it holds it already)."""
        if self.phase is not Phase.STARTING:
            return []
        self._enter(Phase.LOADING, float("inf"))
        return [Tell(spec.rank, Load(spec=spec, pipeline=self._pipeline)) for spec in self._specs.values()]

    def start_failed(self, problem: str, now_s: float) -> list[Action]:
        return self._retry_later(problem, now_s) if self.phase is Phase.STARTING else []

    def on_progress(self, message: Progress) -> None:
        self._progress[message.rank] = (message.done_bytes, message.total_bytes)

    def on_loaded(self, message: Loaded, now_s: float) -> list[Action]:
        if self.phase is not Phase.LOADING:
            return []
        self._loaded[message.rank] = message
        if not self._answered(message.rank):
            return []
        self._epoch_number = max(self._epoch_number + 1, int(now_s * 1000))  # above any epoch of a router before us
        self._enter(Phase.PREPARING, now_s + self._join_timeout_s)
        return [Tell(rank, Prepare(epoch=self._epoch())) for rank in self._specs]

    def on_prepared(self, message: Prepared, now_s: float) -> list[Action]:
        if self.phase is not Phase.PREPARING or message.epoch != self._epoch_number:
            return []
        if not self._answered(message.rank):
            return []
        self._enter(Phase.JOINING, now_s + self._join_timeout_s)
        return [Tell(rank, Join(epoch=self._epoch_number)) for rank in self._specs]

    def on_joined(self, message: Joined) -> list[Action]:
        if self.phase is not Phase.JOINING or message.epoch != self._epoch_number or not self._answered(message.rank):
            return []
        self._enter(Phase.SERVING, float("inf"))
        self._retry_s, self.problem = RETRY_FIRST_S, ""
        return [BeginServing(self._epoch(), dict(self._loaded))]

    def on_failed(self, message: Failed, now_s: float) -> list[Action]:
        """A rank could not do what it was told. Stale news of an epoch that is over is dropped."""
        if self.phase in (Phase.WAITING, Phase.BROKEN, Phase.STARTING):
            return []
        if message.epoch and message.epoch != self._epoch_number:
            return []
        problem = f"rank {message.rank}: {message.problem}"
        if message.fatal:
            actions: list[Action] = [EndEpoch(problem)] if self.serving else []
            self.phase, self.problem, self._phase_ends_s = Phase.BROKEN, problem, float("inf")
            return actions
        return self.end(problem, now_s)

    def end(self, problem: str, now_s: float) -> list[Action]:
        """The epoch is lost (a dead rank, a step over its time). Tries again after a growing pause."""
        if self.phase is Phase.BROKEN:
            return []
        actions: list[Action] = [EndEpoch(problem)] if self.serving else []
        return actions + self._retry_later(problem, now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Lets time pass: a phase over its time fails, a pause ends."""
        if now_s < self._phase_ends_s:
            return []
        if self.phase is Phase.WAITING:
            return self.begin()
        late = ", ".join(str(rank) for rank in sorted(self._waiting_for))
        return self.end(f"{self.phase.value}: no answer from rank {late}", now_s)

    def _epoch(self) -> Epoch:
        store = self._store if len(self._specs) > 1 else ""
        return Epoch(epoch=self._epoch_number, ranks=tuple(self._specs.values()), store=store)

    def _enter(self, phase: Phase, ends_s: float) -> None:
        self.phase, self._phase_ends_s = phase, ends_s
        self._waiting_for = set(self._specs)
        if phase is Phase.LOADING:
            self._loaded, self._progress = {}, {}

    def _answered(self, rank: int) -> bool:
        """Notes an answer; whether it was the last one."""
        self._waiting_for.discard(rank)
        return not self._waiting_for

    def _retry_later(self, problem: str, now_s: float) -> list[Action]:
        self.phase, self.problem = Phase.WAITING, problem
        self._phase_ends_s = now_s + self._retry_s
        self._retry_s = min(self._retry_s * 2, RETRY_MOST_S)
        return []
