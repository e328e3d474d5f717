"""Slices of experts: together they are the experts, in every stored form, and each reads its own part alone."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.checkpoint import pieces
from actors.checkpoint.config import ModelConfig, read_model_config
from actors.checkpoint.index import CheckpointIndex, validate_checkpoint
from actors.checkpoint.layouts import fused
from actors.checkpoint.layouts.rules import experts_prefix
from actors.checkpoint.make_model import make_model
from actors.checkpoint.shapes import SHAPES, StoredExperts, shape_config
from actors.checkpoint.shard import check_expert_shard
from actors.checkpoint.weights import ExpertWeights, Shard, dummy_experts, load_experts
from actors.errors import ConfigError

WIDE = dataclasses.replace(SHAPES["tiny-wide"], num_layers=2, num_experts=3)
SLOTS = {1: (2, 0, 1)}
FORMS: tuple[StoredExperts, ...] = ("fused", "fused_fp8", "per_expert", "fp8", "int4")
HALVES = (Shard(index=0, of=2), Shard(index=1, of=2))
Opened = tuple[CheckpointIndex, ModelConfig]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[StoredExperts], Opened]:
    made: dict[str, Path] = {}

    def get(stored: StoredExperts) -> Opened:
        if stored not in made:
            made[stored] = tmp_path_factory.mktemp("slices") / stored
            make_model(made[stored], WIDE, experts=stored)
        return validate_checkpoint(made[stored]), read_model_config(made[stored])

    return get


def halves(tensors: Sequence[Tensor | None]) -> Tensor:
    """The gate rows of all slices, then the up rows, of every slot."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat([tensor.view(torch.uint8).chunk(2, dim=1)[half] for half in (0, 1) for tensor in present], dim=1)


def assert_together(slices: Sequence[ExpertWeights], whole: ExpertWeights) -> None:
    assert torch.equal(halves([s.gate_up_SND for s in slices]), whole.gate_up_SND.view(torch.uint8))
    downs = [s.down_SDF.view(torch.uint8) for s in slices]
    assert torch.equal(torch.cat(downs, dim=2), whole.down_SDF.view(torch.uint8))
    if whole.gate_up_scale_SN is None or whole.down_scale_SD is None:
        assert all(s.gate_up_scale_SN is None for s in slices)
        return
    scales = [None if s.gate_up_scale_SN is None else s.gate_up_scale_SN.unsqueeze(-1) for s in slices]
    if whole.gate_up_scale_SN.dim() == 3:  # groups
        scales = [s.gate_up_scale_SN for s in slices]
    assert torch.equal(halves(scales).flatten(1), whole.gate_up_scale_SN.view(torch.uint8).flatten(1))
    down_scales = [s.down_scale_SD for s in slices if s.down_scale_SD is not None]
    if whole.down_scale_SD.dim() == 3:
        assert torch.equal(torch.cat(down_scales, dim=2), whole.down_scale_SD)
    else:
        assert all(torch.equal(scale, whole.down_scale_SD) for scale in down_scales)


@pytest.mark.parametrize("long_row_bytes", [1, 10**9])  # parts of rows, and whole rows that are cut in memory
@pytest.mark.parametrize("stored", FORMS)
def test_slices_are_the_whole(
    wide: Callable[[StoredExperts], Opened],
    stored: StoredExperts,
    long_row_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "LONG_ROW_BYTES", long_row_bytes)
    index, config = wide(stored)
    whole = load_experts(index, config, SLOTS, torch.float32, "cpu")[1]
    slices = [load_experts(index, config, SLOTS, torch.float32, "cpu", shard=shard)[1] for shard in HALVES]
    assert slices[0].down_SDF.shape[2] * 2 == whole.down_SDF.shape[2]
    assert_together(slices, whole)


@pytest.mark.parametrize("form", ["plain", "fp8", "int4"])
def test_dummy_slices_are_the_whole(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tensor is made in several blocks; a channel's scale is that of its whole row."""
    monkeypatch.setattr("actors.checkpoint.random_weights.BLOCK_VALUES", 128 * 50)
    config = shape_config(WIDE, experts="int4" if form == "int4" else "fused")
    whole, *slices = (
        dummy_experts(config, SLOTS, torch.bfloat16, "cpu", 3, form, shard)[1]  # type: ignore[arg-type]
        for shard in (Shard(), *HALVES)
    )
    assert_together(slices, whole)


@pytest.mark.parametrize("stored", ["per_expert", "int4"])
def test_a_slice_reads_its_part_alone(
    wide: Callable[[StoredExperts], Opened], stored: StoredExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "LONG_ROW_BYTES", 1)
    index, config = wide(stored)
    totals: dict[int, int] = {}
    for shard in (Shard(), *HALVES):
        load_experts(
            index, config, SLOTS, torch.float32, "cpu",
            lambda _, total, of=shard.of: totals.__setitem__(of, total), shard,  # type: ignore[misc]
        )  # fmt: skip
    assert totals[2] * 2 == totals[1]


def test_of_fused_tensors_long_rows_are_read_in_parts(wide: Callable[[StoredExperts], Opened]) -> None:
    """Gate and up lie in one row: read whole for each of them, a slice would read more than the expert has."""
    index, config = wide("fused")
    info = index.tensors[experts_prefix(1) + "gate_up_proj"]
    long = dataclasses.replace(info, shape=(config.num_experts, config.hidden_size, 2 * 8192), dtype="BF16")
    down = dataclasses.replace(info, shape=(config.num_experts, 8192, config.hidden_size), dtype="BF16")
    tensors = {experts_prefix(1) + "gate_up_proj": long, experts_prefix(1) + "down_proj": down}
    target = pieces_target(config.hidden_size, 8192 // 8)
    read = list(fused.expert_pieces(tensors, 1, 0, target, Shard(index=3, of=8)))
    assert sum(piece.num_bytes for piece in read) == 3 * config.hidden_size * 8192 // 8 * 2


def pieces_target(hidden: int, width: int) -> fused.ExpertTarget:
    return fused.ExpertTarget(
        gate_up_ND=torch.empty(2 * width, hidden, dtype=torch.bfloat16, device="meta"),
        down_DF=torch.empty(hidden, width, dtype=torch.bfloat16, device="meta"),
    )


@pytest.mark.parametrize(("stored", "of", "what"), [
    ("fused", 3, "256 columns of a routed expert cannot be divided by 3"),
    ("int4", 4, "256 columns of a routed expert cannot be divided by 4 in whole groups of 128"),
])  # fmt: skip
def test_what_cannot_be_sliced_is_refused(stored: StoredExperts, of: int, what: str) -> None:
    config = shape_config(WIDE, experts=stored)
    check_expert_shard(config, 1)
    with pytest.raises(ConfigError, match=f"expert_tp: {what}"):
        check_expert_shard(config, of)
    with pytest.raises(ConfigError, match="expert_tp"):
        dummy_experts(config, SLOTS, torch.float32, "cpu", 0, "plain", Shard(index=0, of=of))
