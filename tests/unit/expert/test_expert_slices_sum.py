"""Workers that hold slices: their answers add up to a whole expert's, and no slice ever passes for another."""

import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from actors.checkpoint.shapes import StoredExperts
from actors.checkpoint.shard import Shard
from actors.expert.weight_server import WeightServer
from actors.expert.worker import ExpertWorker
from actors.types import SlotSource

if TYPE_CHECKING:
    from conftest import Setup

CPU = torch.device("cpu")
SLOTS = {1: (0, 1, 2, 3), 3: (3, 1)}
HALVES = (Shard(index=0, of=2), Shard(index=1, of=2))


def load(ours: "Setup", shard: Shard = HALVES[0], sources: tuple[SlotSource, ...] = (), **keys: str) -> ExpertWorker:
    pipeline = dataclasses.replace(ours.pipeline, dtype=str(ours.dtype).removeprefix("torch."), **keys)
    return ExpertWorker.load(ours.config, pipeline, SLOTS, CPU, sources=sources, shard=shard)


@pytest.mark.parametrize("stored", ["fused", "fused_fp8", "per_expert", "fp8", "int4"])
@pytest.mark.parametrize("kind", ["checkpoint", "dummy"])
def test_answers_add_up(setup: Callable[..., "Setup"], stored: StoredExperts, kind: str) -> None:
    ours = setup(stored, torch.float32)
    whole = load(ours, Shard(), load=kind)
    slices = [load(ours, shard, load=kind) for shard in HALVES]
    assert all(part.weight_bytes < 0.51 * whole.weight_bytes for part in slices)
    x_ND = torch.randn(9, ours.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for layer, experts in SLOTS.items():
        slots_N = torch.arange(9) % len(experts)
        terms = [part(layer, x_ND, slots_N) for part in slices]
        expected_ND = whole(layer, x_ND, slots_N)
        errors = [float((y_ND - expected_ND).norm() / expected_ND.norm()) for y_ND in (terms[0], terms[0] + terms[1])]
        # In FP8 a row's hidden values have a scale per slice, and are rounded to 3 bits of mantissa.
        assert errors[0] > 0.5 and errors[1] < (0.04 if "fp8" in stored else 1e-6)


def test_a_slice_comes_from_holders_of_the_same_one_only(
    setup: Callable[..., "Setup"], caplog: pytest.LogCaptureFixture
) -> None:
    ours = setup()
    first, second = (load(ours, shard) for shard in HALVES)
    assert first.weights_name != second.weights_name != load(ours, Shard()).weights_name
    assert first.proofs(SLOTS) != second.proofs(SLOTS)
    for giver, comes in ((second, False), (first, True)):
        server = WeightServer("127.0.0.1", lambda giver=giver: giver)  # type: ignore[misc]
        caplog.clear()
        with caplog.at_level(logging.INFO):
            taker = load(ours, HALVES[0], (SlotSource(endpoint=server.start(), experts=giver.slots),))
        server.stop()
        assert taker.proofs(SLOTS) == first.proofs(SLOTS)
        assert (f"copied {6 if comes else 0} of 6" in caplog.text) and ("holds other weights" in caplog.text) != comes
