"""Where ranks come from: the one thing the router needs of whatever places processes.

Owns the interface only. `cluster/placement.py` implements it with Ray actors, `cluster/local_fleet.py` with plain
processes or threads of this machine.
"""

from collections.abc import Sequence
from typing import Protocol

from actors.types import RankSpec


class Fleet(Protocol):
    """Starts, finds and watches the processes of ranks."""

    def ensure(self, specs: Sequence[RankSpec]) -> dict[int, str]:
        """Makes sure that every rank's process lives (starting it, or finding the one that does) and returns its
        command endpoint by rank. Blocks; called from a thread of its own. Raises UnavailableError when a rank
        cannot be placed.
        """
        ...

    def lost(self) -> list[tuple[int, str]]:
        """Ranks whose process died since the last call, with the cause in words. Does not block."""
        ...
