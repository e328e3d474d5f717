"""Spare slots of a profiled unit hold replicas."""

from collections import Counter

from actors.types import EMPTY_SLOT
from benchmarks.gpu_profile import with_replicas


def test_spare_slots_hold_others_experts_as_evenly_as_can_be() -> None:
    held = [tuple(range(rank * 8, rank * 8 + 8)) + (EMPTY_SLOT,) * 3 for rank in range(4)]
    filled = with_replicas(held)
    assert [experts[:8] for experts in filled] == [experts[:8] for experts in held]
    assert all(len(set(experts)) == 11 and EMPTY_SLOT not in experts for experts in filled)
    copies = Counter(expert for experts in filled for expert in experts)
    assert sorted(copies.values()) == [1] * 20 + [2] * 12


def test_slots_without_spare_ones_stay() -> None:
    held = [(0, 1, 2), (3, 4)]
    assert with_replicas(held) == held
