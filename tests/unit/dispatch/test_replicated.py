"""Replicated dispatch: the parts of all ranks add up to the reference, whoever holds what."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.dispatch.reference import ReferenceDispatch
from actors.dispatch.replicated import ReplicatedDispatch
from actors.types import EMPTY_SLOT

CPU = torch.device("cpu")
E = EMPTY_SLOT
D = 4


class CubingExperts:
    """Expert e answers (x + e)^3; whoever is not here, zeros."""

    def __init__(self, slots: dict[int, tuple[int, ...]]) -> None:
        self.slots = slots
        self.computed: list[int] = []  # expert of each row that was computed

    def __call__(self, layer: int, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        raise AssertionError("rows are not sorted here")

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, slot_of_E: Tensor) -> Tensor:
        slots_TK = slot_of_E[expert_ids_TK].where(expert_ids_TK >= 0, -1)
        experts_TK = torch.tensor([*self.slots.get(layer, ()), 0], dtype=x_TD.dtype)[slots_TK]
        is_here_TK = slots_TK >= 0
        assert not bool((experts_TK[is_here_TK] == EMPTY_SLOT).any()), "a row went to an empty slot"
        self.computed += experts_TK[is_here_TK].long().tolist()
        y_TKD = (x_TD[:, None] * scores_TK[..., None] + experts_TK[..., None]) ** 3
        return y_TKD.masked_fill(~is_here_TK[..., None], 0).sum(1)


def make(
    slots_of: list[dict[int, tuple[int, ...]]], num_experts: int, layers: tuple[int, ...] = (1,), max_small: int = 256
) -> tuple[list[ReplicatedDispatch], list[CubingExperts]]:
    experts = [CubingExperts(slots) for slots in slots_of]
    by_position = dict(enumerate(slots_of))
    return [
        ReplicatedDispatch(experts[i], by_position, layers, num_experts, i, CPU, max_small)
        for i in range(len(slots_of))
    ], experts


def total(ranks: list[ReplicatedDispatch], x: Tensor, ids: Tensor, scores: Tensor, layer: int = 1) -> Tensor:
    parts = [rank.combine(rank.dispatch(x, ids, scores, layer)) for rank in ranks]
    return torch.stack(parts).sum(0)


def test_by_hand() -> None:
    """Rank 0 holds experts 2 and 0, rank 1 expert 1. Row 0 goes to expert 1, row 1 to expert 2, row 2 nowhere."""
    ranks, experts = make([{1: (2, 0)}, {1: (1, E)}], 3)
    x, scores = torch.tensor([[2.0], [3.0], [9.0]]), torch.tensor([[0.5], [2.0], [1.0]])
    ids = torch.tensor([[1], [2], [-1]])
    first, second = (rank.combine(rank.dispatch(x, ids, scores, 1)) for rank in ranks)
    assert first.tolist() == [[0.0], [(2.0 * 3 + 2) ** 3], [0.0]]
    assert second.tolist() == [[(0.5 * 2 + 1) ** 3], [0.0], [0.0]]
    assert [e.computed for e in experts] == [[2], [1]]


def test_in_large_steps_holders_take_tokens_in_turn_and_layers_begin_with_another() -> None:
    slots = {1: (0, 1), 3: (0, 1)}, {1: (0, E), 3: (0, E)}
    x, ids, scores = torch.ones(4, D), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    for layer, turns in ((1, [0, 1, 0, 1]), (3, [1, 0, 1, 0])):
        ranks, _ = make(list(slots), 2, layers=(1, 3), max_small=0)
        parts = [rank.combine(rank.dispatch(x, ids, scores, layer))[:, 0].tolist() for rank in ranks]
        assert parts[0] == [1.0 - turn for turn in turns] and parts[1] == [float(turn) for turn in turns]


def test_in_small_steps_the_busiest_rank_reads_few_experts() -> None:
    """Experts 0 and 1 have rank 0 only, 2 both: it is rank 1's, whatever the tokens' order."""
    ranks, experts = make([{1: (0, 1, 2)}, {1: (2, E, E)}], 3)
    ids = torch.tensor([[2], [0], [2], [1]])
    total(ranks, torch.ones(4, D), ids, torch.ones(4, 1))
    assert experts[0].computed == [0, 1] and experts[1].computed == [2, 2]


def test_tables_change_in_place() -> None:
    """A graph that was captured before an expert moved reads the new table."""
    before = [{1: (0, 1, E)}, {1: (2, E, E)}]
    ranks, experts = make(before, 3)
    tables = [addresses(rank) for rank in ranks]
    after = [{1: (0, E, 2)}, {1: (2, 1, E)}]
    for i, rank in enumerate(ranks):
        experts[i].slots = after[i]
        rank.update(dict(enumerate(after)), i)
    assert tables == [addresses(rank) for rank in ranks]
    x, ids, scores = torch.ones(3, D), torch.tensor([[0], [1], [2]]), torch.ones(3, 1)
    expected = (x + torch.tensor([[0.0], [1.0], [2.0]])) ** 3
    assert torch.equal(total(ranks, x, ids, scores), expected)
    assert sorted(experts[0].computed + experts[1].computed) == [0, 1, 2]


def addresses(rank: ReplicatedDispatch) -> list[int]:
    return [getattr(rank._tables, name).data_ptr() for name in rank._tables.__slots__]


def test_an_expert_that_nobody_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="no rank holds"):
        make([{1: (0,)}, {1: (1,)}], 3)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[dict[int, tuple[int, ...]]], int, Tensor, Tensor, Tensor]:
    num_ranks, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    num_slots = -(-num_experts // num_ranks) + draw(st.integers(0, 2))
    rows = [[EMPTY_SLOT] * num_slots for _ in range(num_ranks)]
    places = draw(st.permutations([(r, s) for r in range(num_ranks) for s in range(num_slots)]))
    for i, (rank, slot) in enumerate(places):
        expert = i if i < num_experts else draw(st.integers(-1, num_experts - 1))
        if expert not in rows[rank]:
            rows[rank][slot] = expert
    for rank, row in enumerate(rows):  # an expert that lost its place to a second slot of its rank
        assert len(set(row) - {EMPTY_SLOT}) == num_slots - row.count(EMPTY_SLOT), rank
    K, T = draw(st.integers(1, min(2, num_experts))), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:K] for _ in range(T)] or [torch.zeros(0)])
    ids = ids.reshape(T, K).long()
    x, scores = torch.randn(T, D, generator=generator), torch.rand(T, K, generator=generator)
    return [{1: tuple(row)} for row in rows], num_experts, x, ids, scores


@settings(max_examples=100, deadline=None)
@given(situation=situations(), max_small=st.sampled_from([0, 256]))
def test_parts_add_up_to_the_reference(
    situation: tuple[list[dict[int, tuple[int, ...]]], int, Tensor, Tensor, Tensor], max_small: int
) -> None:
    slots_of, num_experts, x, ids, scores = situation
    ranks, experts = make(slots_of, num_experts, max_small=max_small)
    reference = ReferenceDispatch({1: [lambda row, e=e: (row + e) ** 3 for e in range(num_experts)]})  # type: ignore[misc]
    expected = reference.combine(reference.dispatch(x, ids, scores, 1))
    torch.testing.assert_close(total(ranks, x, ids, scores), expected, rtol=1e-5, atol=1e-5)
    assert sum(len(e.computed) for e in experts) == ids.numel(), "every row is computed once"
