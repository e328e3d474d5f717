"""Rounds of slot moves: they keep the rules, end, and get where there is room to get."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.types import EMPTY_SLOT
from cluster.slot_moves import Slots, experts_in, next_round

E = EMPTY_SLOT
EVEN = [1.0] * 8


@st.composite
def moves(draw: st.DrawFn) -> tuple[list[Slots], list[set[int]], list[float]]:
    """Slots of ranks, what they should hold (every expert somewhere, no more than the slots), and tokens."""
    num_experts, num_ranks = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rooms = [-(-num_experts // num_ranks) + int(more) for more in rng.integers(0, 3, num_ranks)]
    held, wanted = (_deal(rooms, num_experts, rng) for _ in range(2))
    slots = []
    for room, experts in zip(rooms, held, strict=True):
        row = [*experts, *[EMPTY_SLOT] * (room - len(experts))]
        slots.append(tuple(int(expert) for expert in rng.permutation(row)))
    return slots, wanted, rng.random(num_experts).tolist()


def _deal(rooms: list[int], num_experts: int, rng: np.random.Generator) -> list[set[int]]:
    held: list[set[int]] = [set() for _ in rooms]
    places = rng.permutation([rank for rank, room in enumerate(rooms) for _ in range(room)])
    for i, rank in enumerate(places):
        expert = i if i < num_experts else int(rng.integers(-1, num_experts))
        held[rank] |= {expert} - {EMPTY_SLOT}
    return held


@settings(deadline=None)
@given(move=moves())
def test_rounds_keep_the_rules_and_end_where_no_more_can_move(
    move: tuple[list[Slots], list[set[int]], list[float]],
) -> None:
    slots, wanted, tokens = move
    at_least = {
        expert: max(1, min(sum(expert in row for row in slots), sum(expert in want for want in wanted)))
        for expert in range(len(tokens))
    }
    for _ in range(2 * sum(map(len, slots)) + 1):
        after = next_round(slots, wanted, tokens)
        for was, now, want in zip(slots, after, wanted, strict=True):
            assert len(experts_in(now)) == sum(expert != E for expert in now), "an expert twice on a rank"
            for old, new in zip(was, now, strict=True):
                assert old == new or (old == E and new in want) or (new == E and old not in want)
        assert all(sum(expert in row for row in after) >= num for expert, num in at_least.items())
        if after == slots:
            break
        slots = after
    assert next_round(slots, wanted, tokens) == slots, "rounds do not end"
    reached = [experts_in(row) == want for row, want in zip(slots, wanted, strict=True)]
    stuck = [E not in row and experts_in(row) != want for row, want in zip(slots, wanted, strict=True)]
    assert all(reached) or any(stuck), "a rank with an empty slot does not get what it should"


def test_an_expert_moves_in_one_round_and_two_change_places_in_two() -> None:
    assert next_round([(0, 1), (2, E)], [{0}, {1, 2}], EVEN) == [(0, E), (2, 1)]
    first = next_round([(0, 1), (2, E)], [{0, 2}, {1}], EVEN)
    assert first == [(0, E), (2, 1)]
    assert next_round(first, [{0, 2}, {1}], EVEN) == [(0, 2), (E, 1)]


def test_without_an_empty_slot_a_replica_goes_first() -> None:
    first = next_round([(0, 1), (1, 2)], [{0, 1}, {0, 2}], EVEN)
    assert first == [(0, 1), (E, 2)]
    assert next_round(first, [{0, 1}, {0, 2}], EVEN) == [(0, 1), (0, 2)]


def test_nothing_moves_where_the_last_holders_fill_all_slots() -> None:
    assert next_round([(0, 1), (2, 3)], [{0, 2}, {1, 3}], EVEN) == [(0, 1), (2, 3)]


def test_what_nobody_holds_is_loaded_before_what_is_hot() -> None:
    assert next_round([(E, 0), (1, 3)], [{0, 2}, {1, 3}], EVEN) == [(2, 0), (1, 3)]
    tokens = [9.0, 1.0, 0.5]
    assert next_round([(E,), (0, 1)], [{0, 1, 2}, {0, 1}], tokens) == [(2,), (0, 1)]
    assert next_round([(E,), (0, 1)], [{0, 1}, {0, 1}], tokens) == [(0,), (0, 1)]


def test_of_two_replicas_the_one_goes_whose_slot_is_needed() -> None:
    """Nobody wants expert 0 but rank 2, which is full; rank 1 needs room for expert 2."""
    assert next_round([(0, E), (0, 1), (2, 3)], [set(), {1, 2}, {0, 3}], EVEN) == [(0, E), (E, 1), (2, 3)]
