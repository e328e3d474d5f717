"""Where ranks come from: the one thing the router needs of whatever places processes.

Owns the interface only. `cluster/placement.py` implements it with Ray actors, `cluster/local_fleet.py` with plain
processes of this machine. Nothing here blocks, `has_room` apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.types import RankEndpoints, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class RankUp:
    """A rank's process lives and listens."""

    rank: int
    endpoints: RankEndpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDown:
    """A rank's process ended, or never came to be."""

    rank: int
    cause: str


FleetNews = RankUp | RankDown


class Fleet(Protocol):
    """Starts, finds, watches and ends the processes of ranks."""

    def find(self) -> tuple[int, ...]:
        """Ranks that an earlier router left; their RankUp (or RankDown) follows as news. Called once, first."""
        ...

    def start(self, rank: int, roles: Sequence[Role]) -> None:
        """Begins to start a process for a new rank number. RankUp or RankDown follows as news."""
        ...

    def has_room(self, roles: Sequence[Role]) -> bool:
        """Whether a process for a rank of these roles could start now, without a node more. May block, unlike the rest,
        and is called from another thread.
        """
        ...

    def kill(self, rank: int) -> None:
        """Ends a rank's process, however deaf it is. RankDown follows unless it was told already."""
        ...

    def news(self) -> list[FleetNews]:
        """What happened since the last call."""
        ...
