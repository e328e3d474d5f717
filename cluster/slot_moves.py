"""From the slots that ranks have to the experts that they should hold, one round at a time.

Owns the rules by which slots may change while they are read: an expert is loaded only where a slot is empty now, and
leaves only where other holders suffice. Knows nothing of why a rank should hold an expert (`cluster/replicas.py`).
"""

from collections import Counter
from collections.abc import Sequence, Set

from actors.types import EMPTY_SLOT

Slots = tuple[int, ...]
"""Experts of one layer on one rank, in slot order, EMPTY_SLOT where there is none."""


def experts_in(slots: Slots) -> set[int]:
    """The experts that are there."""
    return set(slots) - {EMPTY_SLOT}


def next_round(slots: Sequence[Slots], wanted: Sequence[Set[int]], tokens: Sequence[float]) -> list[Slots]:
    """One layer's slots of every rank after one round towards `wanted`; the same slots if nothing can move.

    `wanted[i]` are the experts that rank i should hold, no more than it has slots. Where there is not room for all at
    once, experts that nobody holds are loaded first, then the hottest by `tokens`. An expert keeps as many holders as
    it has now or is wanted to have, whichever is less, and one at least; those that are loaded in this round count. A
    round only adds what is wanted and drops what is not, so that rounds end.
    """
    held = [experts_in(row) for row in slots]
    holders, floors = _counts(held), _counts(wanted)
    added = [_to_load(row, wanted[i] - held[i], holders, tokens) for i, row in enumerate(slots)]
    after = holders + _counts(added)
    num_waiting = [len(wanted[i] - held[i]) - len(added[i]) for i in range(len(slots))]
    dropped: list[set[int]] = [set() for _ in slots]
    for i in sorted(range(len(slots)), key=lambda i: -num_waiting[i]):  # room first where it is needed
        for expert in sorted(held[i] - wanted[i], key=lambda expert: (tokens[expert], expert)):
            if after[expert] > max(1, min(holders[expert], floors[expert])):
                after[expert] -= 1
                dropped[i].add(expert)
    return [_rewritten(*change) for change in zip(slots, added, dropped, strict=True)]


def _to_load(row: Slots, missing: Set[int], holders: Counter[int], tokens: Sequence[float]) -> list[int]:
    order = sorted(missing, key=lambda expert: (holders[expert] > 0, -tokens[expert], expert))
    return order[: row.count(EMPTY_SLOT)]


def _rewritten(row: Slots, added: Sequence[int], dropped: Set[int]) -> Slots:
    """`row` with `added` in its empty slots and those of `dropped` empty; all else stays where it is."""
    new = iter(added)
    return tuple(
        next(new, EMPTY_SLOT) if expert == EMPTY_SLOT else EMPTY_SLOT if expert in dropped else expert for expert in row
    )


def _counts(sets: Sequence[Sequence[int] | Set[int]]) -> Counter[int]:
    return Counter(expert for experts in sets for expert in experts)
