"""Who should take part next: what the router asks of its planner.

Owns the words only. `cluster/balance.py` answers them; the router carries the answers out, epoch by epoch. All is
pure: the same arguments give the same membership.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.types import RankSpec

ExpertTokens = Mapping[int, Sequence[float]]
"""Layer -> tokens that went to each expert, lately. Layers without figures may be absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """How many ranks of each role there should be. Colocated ranks count in both."""

    attention_ranks: int
    expert_ranks: int
    why: str = ""  # one line for people: what asked for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A membership that can follow the current one in one epoch, and why, in one line for people.

    `start_within_s` is how long its new ranks may take to come up; None is as long as a node takes to be brought.
    """

    ranks: tuple[RankSpec, ...]
    why: str
    start_within_s: float | None = None


class MembershipPlanner(Protocol):
    """Plans memberships. New ranks get the numbers `next_rank`, `next_rank + 1`, ...; ranks ascend in the result.

    Every membership that is returned has an attention rank, a holder for every expert of every MoE layer, and no rank
    with two slots of one expert. Attention units are whole in it: every shard is there once, and no rank that stays
    gets another shard.
    """

    def first(self, goal: Goal, next_rank: int) -> tuple[RankSpec, ...]:
        """A membership from nothing."""
        ...

    def recover(self, survivors: Sequence[RankSpec], lost: Sequence[RankSpec], next_rank: int) -> tuple[RankSpec, ...]:
        """The membership that serves soonest after a loss. Survivors keep every expert that they have.

        The survivors as they are, where they suffice; else with what is missing put in their empty slots, where there
        is room; else with new ranks in the place of as few lost ones as it takes.
        """
        ...

    def propose(self, current: Sequence[RankSpec], goal: Goal, tokens: ExpertTokens, next_rank: int) -> Proposal | None:
        """The next step from `current` towards the goal and towards balance; None where there is nothing (worth) doing.

        In one step a rank may get experts in slots that are empty now, and lose those that another rank still holds,
        but no slot changes from one expert to another: its weights are loaded while the current epoch reads it.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """How busy the pipeline is, as of now."""

    num_queued: int
    queue_s: float  # until what waits now is likely to have been admitted; 0 if nothing waits
    num_running: int
    num_seats: int  # requests that can run at once
    kv_used_fraction: float  # of the fuller page group, in [0, 1]
    step_ms: float  # mean of the last second; 0 if there was no step
    attention_ranks: int
    expert_ranks: int


class Scaler(Protocol):
    """Decides how many ranks there should be. Called about once a second."""

    @property
    def rebalances(self) -> bool:
        """Whether experts may be moved for the sake of balance."""
        ...

    @property
    def rebalance_interval_s(self) -> float:
        """Least time between two looks at the balance."""
        ...

    @property
    def slow_rank_factor(self) -> float:
        """A rank that takes so many times as long as it should is replaced; 0 is never."""
        ...

    @property
    def slow_rank_s(self) -> float:
        """For how long it must have done so."""
        ...

    def observe(self, seen: Observation, now_s: float) -> Goal: ...
