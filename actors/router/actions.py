"""What the epoch machine has the router do, and what it remembers of changes.

Owns the words only: `epochs.py` says them, `core.py` carries them out.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from actors.types import Epoch, Loaded, RankEndpoints, Role, ToRank


@dataclass(frozen=True, slots=True)
class Start:
    """Begin a process for a new rank."""

    rank: int
    roles: tuple[Role, ...]


@dataclass(frozen=True, slots=True)
class Kill:
    """End a rank's process and forget it."""

    rank: int


@dataclass(frozen=True, slots=True)
class Connect:
    """Open the channels to a rank that came up."""

    rank: int
    endpoints: RankEndpoints


@dataclass(frozen=True, slots=True)
class Tell:
    rank: int
    message: ToRank


@dataclass(frozen=True, slots=True)
class Suspend:
    """The epoch is over without a successor yet; requests wait. Steps that were sent may never be answered."""

    problem: str


@dataclass(frozen=True, slots=True)
class BeginServing:
    """All ranks of `epoch` have joined. Attention ranks in `kept` still have their requests, the others have none; of a
    unit of several ranks all are in it, or none.
    """

    epoch: Epoch
    loaded: dict[int, Loaded]
    kept: frozenset[int]


Action = Start | Kill | Connect | Tell | Suspend | BeginServing


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeRecord:
    """One change as people look back on it. Times in seconds; `pause_s` is how long no step was planned for it,
    `phases_s` how long each of its phases took, in their order.
    """

    epoch: int
    why: str
    began_s: float
    took_s: float
    pause_s: float
    problem: str  # empty if it succeeded
    phases_s: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
