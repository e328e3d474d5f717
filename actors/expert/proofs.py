"""Whether replicas agree: what the router asks of the proofs before a routing table may name a slot.

Owns the vote. Pure, and imports no torch: proofs are made by `worker.py`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from actors.types import EMPTY_SLOT, RankSpec, SlotProof

PROBE_TOLERANCE = 0.05  # relative; kernels round differently, and one fp8 step of one value is 6 %

Proofs = Mapping[int, Sequence[SlotProof]]
"""Layer -> proof of each slot, as in Loaded."""


class Disagreement(NamedTuple):
    """A slot that must not serve, and why, in words."""

    rank: int
    layer: int
    slot: int
    why: str


class _Holder(NamedTuple):
    rank: int
    slot: int
    proof: SlotProof


def disagreements(specs: Iterable[RankSpec], proofs_of_rank: Mapping[int, Proofs]) -> list[Disagreement]:
    """Slots that lack a proof, compute nonsense, or differ from the other replicas of their expert (of its slice).

    The majority is right; where there is none, the oldest rank is (the one with the lowest number). Empty slots are not
    looked at. By rank, layer and slot.
    """
    found: list[Disagreement] = []
    holders: dict[tuple[int, int, tuple[int, int]], list[_Holder]] = {}  # of the same slice
    for spec in sorted(specs, key=lambda spec: spec.rank):
        for layer, experts in spec.slots.items():
            proofs = proofs_of_rank.get(spec.rank, {}).get(layer, ())
            for slot, expert in enumerate(experts):
                if expert == EMPTY_SLOT:
                    continue
                if slot >= len(proofs):
                    found.append(Disagreement(spec.rank, layer, slot, "has no proof"))
                elif not math.isfinite(proofs[slot].probe):
                    found.append(Disagreement(spec.rank, layer, slot, f"expert {expert} is not finite"))
                else:
                    holder = _Holder(spec.rank, slot, proofs[slot])
                    holders.setdefault((layer, expert, spec.expert_shard), []).append(holder)
    for (layer, expert, _), group in holders.items():
        found += [Disagreement(rank, layer, slot, f"expert {expert} {why}") for rank, slot, why in _outvoted(group)]
    return sorted(found)


def _outvoted(group: Sequence[_Holder]) -> list[tuple[int, int, str]]:
    """Of the holders of one expert, oldest first, those that the others contradict."""
    right = _most_agreed(group, lambda a, b: a.checksum == b.checksum)
    same = [holder for holder in group if holder.proof.checksum == right.proof.checksum]
    normal = _most_agreed(same, lambda a, b: _alike(a.probe, b.probe))
    out = []
    for rank, slot, proof in group:
        if proof.checksum != right.proof.checksum:
            out.append((rank, slot, f"has other weights than on rank {right.rank}"))
        elif not _alike(proof.probe, normal.proof.probe):
            values = f"{proof.probe:.6g} and {normal.proof.probe:.6g}"
            out.append((rank, slot, f"computes otherwise than on rank {normal.rank}: probes are {values}"))
    return out


def _most_agreed(group: Sequence[_Holder], agree: Callable[[SlotProof, SlotProof], bool]) -> _Holder:
    """The holder with whom most agree; the first of several."""
    return max(group, key=lambda holder: sum(agree(holder.proof, other.proof) for other in group))


def _alike(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=PROBE_TOLERANCE)
