"""The routing table against tables written by hand."""

import pytest
import torch

from actors.dispatch.contract import build_routing_table

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
