"""Local dispatch and the reference: permutations by hand, then one against the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.dispatch.contract import RoutingTable, build_routing_table
from actors.dispatch.local import LocalDispatch
from actors.dispatch.reference import ReferenceDispatch

CPU = torch.device("cpu")
D = 4


class CubingExperts:
    """Expert e of slot s answers (x + e)^3, so that neither score nor expert nor row can be mistaken unseen."""

    def __init__(self, slots: dict[int, tuple[int, ...]]) -> None:
        self._slots = slots
        self.calls: list[tuple[int, list[int]]] = []

    def __call__(self, layer: int, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        self.calls.append((layer, slots_N.tolist()))
        experts_N = torch.tensor(self._slots[layer], dtype=x_ND.dtype)[slots_N]
        return (x_ND + experts_N[:, None]) ** 3


def _table(slots: dict[int, tuple[int, ...]], num_experts: int) -> RoutingTable:
    return build_routing_table({0: slots}, tuple(sorted(slots)), num_experts, CPU)


def _run(dispatch: LocalDispatch | ReferenceDispatch, x: Tensor, ids: Tensor, scores: Tensor, layer: int) -> Tensor:
    dispatch.begin_step((x.shape[0],))
    return dispatch.combine(dispatch.dispatch(x, ids, scores, layer))


def test_by_hand() -> None:
    """Slots hold experts 2, 0, 1. Row 0 goes to expert 1 (slot 2), row 1 to expert 2 (slot 0), halves and doubled."""
    experts = CubingExperts({3: (2, 0, 1)})
    x_TD = torch.tensor([[2.0], [3.0]])
    y_TD = _run(
        LocalDispatch(experts, _table({3: (2, 0, 1)}, 3)),
        x_TD,
        torch.tensor([[1], [2]]),
        torch.tensor([[0.5], [2.0]]),
        3,
    )
    assert experts.calls == [(3, [2, 0])]
    assert y_TD.tolist() == [[(0.5 * 2 + 1) ** 3], [(2.0 * 3 + 2) ** 3]]


def test_top2_by_hand() -> None:
    experts = CubingExperts({1: (0, 1, 2)})
    y_TD = _run(
        LocalDispatch(experts, _table({1: (0, 1, 2)}, 3)),
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[2, 0], [1, 2]]),
        torch.tensor([[1.0, 3.0], [0.5, 1.0]]),
        1,
    )
    assert y_TD.tolist() == [[(1 + 2) ** 3 + 3.0**3], [(1 + 1) ** 3 + (2 + 2) ** 3]]


@settings(deadline=None, max_examples=60)
@given(
    num_tokens=st.integers(0, 9),
    top_k=st.integers(1, 3),
    order=st.permutations(range(5)),
    lopsided=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_equals_the_reference(num_tokens: int, top_k: int, order: list[int], lopsided: bool, seed: int) -> None:
    """Any assignment of experts to slots, empty steps, and all tokens to the same experts."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, D, generator=generator)
    logits_TE = torch.rand(1 if lopsided else num_tokens, 5, generator=generator).expand(num_tokens, 5)
    scores_TK, ids_TK = logits_TE.topk(top_k)
    slots = {2: tuple(reversed(range(5))), 6: tuple(order)}
    local = LocalDispatch(CubingExperts(slots), _table(slots, 5))
    reference = ReferenceDispatch({layer: [lambda x, e=e: (x + e) ** 3 for e in range(5)] for layer in slots})
    for layer in slots:
        ours = _run(local, x_TD, ids_TK, scores_TK, layer)
        assert torch.allclose(ours, _run(reference, x_TD, ids_TK, scores_TK, layer), rtol=1e-5)
        assert ours.dtype == x_TD.dtype


def test_replicas_in_one_process_are_one() -> None:
    experts = CubingExperts({1: (0, 1, 0)})
    x_TD = torch.ones(3, D)
    _run(LocalDispatch(experts, _table({1: (0, 1, 0)}, 2)), x_TD, torch.tensor([[0], [1], [0]]), torch.ones(3, 1), 1)
    assert experts.calls == [(1, [0, 1, 0])]


def test_experts_elsewhere_are_refused() -> None:
    table = build_routing_table({0: {1: (0,)}, 1: {1: (1,)}}, (1,), 2, CPU)
    with pytest.raises(ValueError, match="spread over ranks"):
        LocalDispatch(CubingExperts({1: (0,)}), table)
