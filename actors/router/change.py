"""A change of membership on its way: the phase that it is in, who has not answered, what it took, and which attention
units it leaves as they are.

Owns what is known of one change. Knows nothing of what follows from it (`epochs.py`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from actors.router.actions import ChangeRecord
from actors.types import Epoch, Load, RankSpec


class Phase(Enum):
    STARTING = "starting ranks"
    LOADING = "loading weights"
    PREPARING = "preparing the epoch"
    DRAINING = "finishing steps"
    JOINING = "joining the epoch"


@dataclass(slots=True)
class Change:
    epoch: Epoch
    why: str
    began_s: float
    is_planned: bool
    phase: Phase = Phase.STARTING
    waiting_for: set[int] = field(default_factory=set)
    ends_s: float = float("inf")
    paused_s: float = 0.0  # when planning stopped for it
    phases_s: dict[str, float] = field(default_factory=dict)  # that are over
    entered_s: float = 0.0  # when the phase that it is in began
    loads: dict[int, Load] = field(default_factory=dict)  # what each rank was told to load
    heard_s: dict[int, float] = field(default_factory=dict)  # when a rank that loads was last told, or heard of
    accused: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> tuple[RankSpec, ...]:
        return self.epoch.ranks

    @property
    def numbers(self) -> set[int]:
        return numbers(self.ranks)

    def spec_of(self, rank: int) -> RankSpec:
        return next(spec for spec in self.ranks if spec.rank == rank)

    @property
    def most_accused(self) -> list[int]:
        """The one rank that most others cannot reach; of equals the youngest, which has the least to lose."""
        if not self.accused:
            return []
        most = max(self.accused.values())
        return [max(rank for rank, count in self.accused.items() if count == most)]

    def leave_phase(self, now_s: float) -> None:
        """Notes how long it took."""
        if self.entered_s:
            self.phases_s[self.phase.value] = now_s - self.entered_s
        self.entered_s = now_s

    def record(self, problem: str, pause_s: float, now_s: float) -> ChangeRecord:
        """What is remembered of it, as it ends."""
        self.leave_phase(now_s)
        return ChangeRecord(
            epoch=self.epoch.epoch,
            why=self.why,
            began_s=self.began_s,
            took_s=now_s - self.began_s,
            pause_s=pause_s,
            problem=problem,
            phases_s=self.phases_s,
        )


def numbers(ranks: Sequence[RankSpec]) -> set[int]:
    return {spec.rank for spec in ranks}


def shared(epoch: Epoch | None) -> set[int]:
    """Ranks that share an attention with others."""
    return {spec.rank for spec in epoch.ranks if spec.shard[1] > 1} if epoch else set()


def same_units(before: Epoch | None, after: Sequence[RankSpec]) -> set[int]:
    """Ranks whose units have the same members, with the same shards, as before."""
    old, new = _units(before.ranks if before else ()), _units(after)
    return {rank for unit in old.values() if unit in new.values() for rank, _ in unit}


def _units(ranks: Sequence[RankSpec]) -> dict[int, set[tuple[int, tuple[int, int]]]]:
    """By leader: its unit's members, each with its shard."""
    units: dict[int, set[tuple[int, tuple[int, int]]]] = {}
    for spec in ranks:
        units.setdefault(spec.unit, set()).add((spec.rank, spec.shard))
    return units
