"""Which replicas the router believes: the majority, then the oldest rank."""

import subprocess
import sys

from msgspec import structs

from actors.expert.proofs import disagreements
from actors.types import EMPTY_SLOT, RankSpec, SlotProof


def _spec(rank: int, *experts: int) -> RankSpec:
    return RankSpec(rank=rank, roles=("expert",), slots={1: experts})


def _proofs(*values: tuple[int, float]) -> dict[int, tuple[SlotProof, ...]]:
    return {1: tuple(SlotProof(checksum=checksum, probe=probe) for checksum, probe in values)}


def _places(specs: list[RankSpec], proofs: dict[int, dict[int, tuple[SlotProof, ...]]]) -> list[tuple[int, int, int]]:
    return [tuple(found[:3]) for found in disagreements(specs, proofs)]  # type: ignore[misc]


def test_replicas_that_agree_and_empty_slots() -> None:
    specs = [_spec(0, 5, EMPTY_SLOT), _spec(3, 6, 5)]
    proofs = {0: _proofs((11, 1.0), (0, 0.0)), 3: _proofs((22, 2.0), (11, 1.01))}
    assert disagreements(specs, proofs) == []


def test_the_majority_is_right_even_against_the_oldest() -> None:
    specs = [_spec(rank, 5) for rank in (2, 4, 9)]
    proofs = {2: _proofs((7, 1.0)), 4: _proofs((8, 1.0)), 9: _proofs((8, 1.0))}
    (found,) = disagreements(specs, proofs)
    assert found == (2, 1, 0, "expert 5 has other weights than on rank 4")


def test_of_two_the_oldest_is_right_in_whatever_order_they_come() -> None:
    specs = [_spec(4, 5), _spec(2, 5)]
    proofs = {2: _proofs((7, 1.0)), 4: _proofs((8, 1.0))}
    assert _places(specs, proofs) == _places(specs[::-1], proofs) == [(4, 1, 0)]


def test_experts_of_other_layers_are_other_experts() -> None:
    specs = [RankSpec(rank=0, roles=("expert",), slots={1: (5,), 3: (5,)})]
    proof = SlotProof(checksum=1, probe=1.0)
    assert disagreements(specs, {0: {1: (proof,), 3: (SlotProof(checksum=2, probe=9.0),)}}) == []


def test_slices_of_one_expert_are_no_replicas() -> None:
    halves = [structs.replace(_spec(rank, 5), expert_shard=(rank % 2, 2)) for rank in range(4)]
    proofs = {0: _proofs((7, 1.0)), 1: _proofs((8, 3.0)), 2: _proofs((7, 1.0)), 3: _proofs((9, 3.0))}
    assert _places(halves, proofs) == [(3, 1, 0)]


def test_probes_that_are_not_finite_have_no_vote() -> None:
    """Two broken holders with equal weights do not outvote a sound one."""
    specs = [_spec(rank, 5) for rank in range(3)]
    proofs = {0: _proofs((7, float("nan"))), 1: _proofs((7, float("inf"))), 2: _proofs((8, 1.0))}
    assert _places(specs, proofs) == [(0, 1, 0), (1, 1, 0)]


def test_the_same_weights_that_compute_otherwise() -> None:
    specs = [_spec(rank, 5) for rank in range(3)]
    proofs = {0: _proofs((7, 2.0)), 1: _proofs((7, 1.0)), 2: _proofs((7, 1.02))}
    (found,) = disagreements(specs, proofs)
    assert found[:3] == (0, 1, 0)
    assert "probes are 2 and 1" in found.why


def test_other_weights_have_no_vote_on_probes() -> None:
    specs = [_spec(rank, 5) for rank in range(3)]
    proofs = {0: _proofs((8, 1.0)), 1: _proofs((8, 9.0)), 2: _proofs((7, 9.0))}
    assert _places(specs, proofs) == [(1, 1, 0), (2, 1, 0)]


def test_a_slot_without_proof() -> None:
    specs = [_spec(0, 5, 6), _spec(1, EMPTY_SLOT), _spec(2, 6)]
    assert _places(specs, {0: _proofs((7, 1.0))}) == [(0, 1, 1), (2, 1, 0)]


def test_an_expert_that_is_all_zeros_agrees_with_itself() -> None:
    specs = [_spec(0, 5), _spec(1, 5)]
    assert disagreements(specs, {0: _proofs((7, 0.0)), 1: _proofs((7, 0.0))}) == []


def test_the_vote_needs_no_torch() -> None:
    code = "import sys, actors.expert.proofs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
