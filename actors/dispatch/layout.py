"""Where the rows of a step lie in a rank's buffer, as plain numbers that every rank derives from the plan.

Owns capacities and offsets. Knows nothing of tensors or groups. In a step a source (an attention rank with tokens)
sends every expert rank rows for its slots, in one of two ways that both ends agree on beforehand:

- fixed: one message of as many rows as the source has in all, the unused ones marked by slot -1. No counts travel, so
  nobody waits for them, and a GPU needs no host.
- counted: a header with the count, then a message of exactly that size. For steps whose padding would cost more.

The buffer of a rank holds, in this order: the rows it sends (blocks by expert rank, its own experts' rows last), the
fixed blocks it receives, the counted rows it receives. So what its experts compute is always one contiguous range.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """An attention rank that sends rows here. `start` is the first row of its fixed block, -1 if it is counted."""

    rank: int
    num_rows: int  # of the block if fixed, else the most that may come
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLayout:
    """One step as one rank sees it. Row numbers index its buffer.

    Rows [0, out_rows) are its own: expert rank d of `num_destinations` has block d of `block_rows` rows if `own_fixed`,
    else all rows lie close together in the order of destinations. Counted rows arrive from `counted_start` on.
    """

    own_rows: int
    own_fixed: bool
    block_rows: int
    out_rows: int
    fixed_sources: tuple[Source, ...]
    counted_sources: tuple[Source, ...]
    counted_start: int
    capacity_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Who takes part, as this rank sees it. Destinations are the expert ranks, ascending, this rank itself last."""

    rank: int
    attention_ranks: tuple[int, ...]
    destinations: tuple[int, ...]

    @property
    def is_expert(self) -> bool:
        return self.rank in self.destinations


def order_destinations(rank: int, expert_ranks: Iterable[int]) -> tuple[int, ...]:
    """Expert ranks ascending, but `rank` itself last: its rows then lie next to those that others send it."""
    return tuple(sorted(expert_ranks, key=lambda expert_rank: (expert_rank == rank, expert_rank)))


def lay_out_step(
    members: Membership, tokens_of_rank: Sequence[int], experts_per_token: int, inline_rows: int
) -> StepLayout:
    """Places the rows of a step. A source is fixed up to `inline_rows` rows, or if all rows go to one rank anyway."""
    one_destination = len(members.destinations) == 1

    def is_fixed(num_rows: int) -> bool:
        return one_destination or num_rows <= inline_rows

    is_source = members.rank in members.attention_ranks
    own_rows = tokens_of_rank[members.rank] * experts_per_token if is_source else 0
    own_fixed = is_fixed(own_rows)
    out_rows = own_rows * len(members.destinations) if own_fixed else own_rows
    at = out_rows
    fixed: list[Source] = []
    counted: list[Source] = []
    for rank in members.attention_ranks if members.is_expert else ():
        num_rows = tokens_of_rank[rank] * experts_per_token
        if rank == members.rank or num_rows == 0:
            continue
        if is_fixed(num_rows):
            fixed.append(Source(rank, num_rows, at))
            at += num_rows
        else:
            counted.append(Source(rank, num_rows, -1))
    return StepLayout(
        own_rows=own_rows,
        own_fixed=own_fixed,
        block_rows=own_rows if own_fixed else 0,
        out_rows=out_rows,
        fixed_sources=tuple(fixed),
        counted_sources=tuple(counted),
        counted_start=at,
        capacity_rows=at + sum(source.num_rows for source in counted),
    )
