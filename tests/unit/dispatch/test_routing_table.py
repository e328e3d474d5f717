"""The routing table against tables written by hand."""

import pytest
import torch

from actors.dispatch.contract import build_routing_table
from actors.dispatch.rows import DevicePlacer, HostPlacer, RowBuffer, TokenShape
from actors.types import EMPTY_SLOT

CPU = torch.device("cpu")


def test_slots_are_inverted() -> None:
    slots = {0: {1: (2, 0), 3: (0,)}, 1: {1: (1,), 3: (1, 2)}}
    table = build_routing_table(slots, (1, 3), 3, CPU)
    assert table.layers == (1, 3)
    assert table.ranks_MER.tolist() == [[[0], [1], [0]], [[0], [1], [1]]]
    assert table.slots_MER.tolist() == [[[1], [0], [0]], [[0], [0], [1]]]
    assert table.num_replicas_ME.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_unused_entries_repeat_valid_ones() -> None:
    slots = {2: {0: (0, 1)}, 4: {0: (1,)}, 7: {0: (1,)}}
    table = build_routing_table(slots, (0,), 2, CPU)
    assert table.num_replicas_ME.tolist() == [[1, 3]]
    assert table.ranks_MER.tolist() == [[[2, 2, 2], [2, 4, 7]]]
    assert table.slots_MER.tolist() == [[[0, 0, 0], [1, 0, 0]]]


def test_an_expert_that_nobody_holds_is_named() -> None:
    with pytest.raises(ValueError, match=r"no rank holds expert 1 of layer 5 \(2 missing\)"):
        build_routing_table({0: {5: (0,)}}, (5,), 3, CPU)


def test_empty_slots_are_no_experts_and_count_in_the_numbering() -> None:
    slots = {0: {1: (EMPTY_SLOT, 1, EMPTY_SLOT, 0)}, 2: {1: (EMPTY_SLOT, EMPTY_SLOT)}, 3: {1: (EMPTY_SLOT, 0)}}
    table = build_routing_table(slots, (1,), 2, CPU)
    assert table.ranks_MER.tolist() == [[[0, 3], [0, 0]]]
    assert table.slots_MER.tolist() == [[[3, 1], [1, 1]]]
    assert table.num_replicas_ME.tolist() == [[2, 1]]


def test_an_expert_that_only_an_empty_slot_could_hold_is_missing() -> None:
    with pytest.raises(ValueError, match="no rank holds expert 0 of layer 1"):
        build_routing_table({0: {1: (EMPTY_SLOT,)}}, (1,), 1, CPU)


@pytest.mark.parametrize("placer", [HostPlacer, DevicePlacer])
def test_rows_never_go_to_an_empty_slot_nor_to_a_rank_of_empty_slots(placer: type[HostPlacer | DevicePlacer]) -> None:
    """Ranks 1 and 5 hold expert 0, rank 5 alone expert 1; rank 3 holds nothing and is no destination."""
    slots = {1: {0: (EMPTY_SLOT, 0)}, 3: {0: (EMPTY_SLOT,)}, 5: {0: (1, EMPTY_SLOT, 0)}}
    routing = build_routing_table(slots, (0,), 2, CPU)
    buffer = RowBuffer(TokenShape(hidden=4, experts_per_token=1, dtype=torch.float32, device=CPU))
    buffer.reserve(20)
    experts_TK = torch.tensor([[0], [1], [0], [1], [0]])
    place_N, _ = placer(routing, (1, 5), 0).place(0, experts_TK, torch.zeros(5, 4), buffer, block_rows=5)
    went = [(int(place) // 5, int(buffer.slots_N[place])) for place in place_N]
    assert went == [(0, 1), (1, 0), (0, 1), (1, 0), (0, 1)]
    assert (buffer.slots_N[:10] == -1).sum() == 5
