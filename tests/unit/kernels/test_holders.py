"""Who computes an expert that several ranks hold: by hand, over random steps, and by the kernel, interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import run_interpreted
from torch import Tensor

from actors.kernels import holders
from actors.kernels.triton_here import HAS_TRITON

NOWHERE = -1


def tables(masks: list[int], rank: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """holders_E and slots_EW of `rank`, whose slot of expert e is 10 * e."""
    slots = [[10 * e if w == rank and mask >> w & 1 else -1 for w in range(num_ranks)] for e, mask in enumerate(masks)]
    return torch.tensor(masks), torch.tensor(slots)


def computed(ids: list[int], masks: list[int], rank: int, num_ranks: int) -> list[int]:
    """Experts that `rank` computes."""
    slots_E = holders.choose_slots(torch.tensor(ids), *tables(masks, rank, num_ranks))
    assert all(slot in (-1, 10 * e) for e, slot in enumerate(slots_E.tolist()))
    return [e for e, slot in enumerate(slots_E.tolist()) if slot >= 0]


def test_by_hand() -> None:
    """Experts 0 and 1 are rank 0's, 2 and 3 both ranks', 4 nobody's in this step."""
    masks = [0b01, 0b01, 0b11, 0b11, 0b11]
    ids = [3, 0, NOWHERE, 2, 1, 3]
    assert computed(ids, masks, 0, 2) == [0, 1] and computed(ids, masks, 1, 2) == [2, 3]
    assert computed([2, 2, 3], masks, 0, 2) == [2] and computed([2, 2, 3], masks, 1, 2) == [3]
    assert computed([NOWHERE], masks, 0, 2) == computed([], masks, 1, 2) == []


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    num_ranks, num_experts = draw(st.integers(1, 8)), draw(st.integers(1, 20))
    masks = draw(st.lists(st.integers(1, 2**num_ranks - 1), min_size=num_experts, max_size=num_experts))
    return draw(st.lists(st.integers(-1, num_experts - 1), max_size=40)), masks, num_ranks


@settings(max_examples=100, deadline=None)
@given(step=steps())
def test_every_expert_of_the_step_is_computed_by_one_of_its_holders(step: tuple[list[int], list[int], int]) -> None:
    ids, masks, num_ranks = step
    of_rank = [computed(ids, masks, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(e for experts in of_rank for e in experts) == sorted(set(ids) - {NOWHERE})
    assert all(masks[e] >> rank & 1 for rank, experts in enumerate(of_rank) for e in experts)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_the_kernel_in_the_interpreter() -> None:
    run_interpreted(__file__)


def main() -> None:
    generator = torch.Generator().manual_seed(5)
    for num_ids, num_experts, num_ranks in ((1, 3, 1), (7, 16, 4), (40, 16, 3), (70, 24, 8)):
        masks = torch.randint(1, 2**num_ranks, (num_experts,), generator=generator).tolist()
        ids = torch.randint(-1, num_experts, (num_ids,), generator=generator)
        for rank in range(num_ranks):
            holders_E, slots_EW = tables(masks, rank, num_ranks)
            expected = holders.choose_slots(ids, holders_E, slots_EW)
            assert torch.equal(holders._with_triton(ids, holders_E, slots_EW), expected)


if __name__ == "__main__":
    main()
