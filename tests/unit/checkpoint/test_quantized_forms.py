"""Quantized checkpoints give the numbers that their format's definition says, in every layout, on a CPU as stored."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.checkpoint.config import read_model_config
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.make_model import make_model
from actors.checkpoint.quantized import quantize_int4, widen_int4
from actors.checkpoint.shapes import SHAPES, ModelShape, StoredExperts
from actors.checkpoint.weights import (
    DenseFfn,
    MoeGate,
    Room,
    dummy_attention,
    dummy_experts,
    load_attention,
    load_experts,
)
from actors.config import PipelineConfig
from actors.expert.worker import ExpertWorker

CPU = torch.device("cpu")
WIDE: ModelShape = dataclasses.replace(SHAPES["tiny-wide"], num_layers=2)  # layer 0 is dense, layer 1 has experts
QUANTIZED: tuple[StoredExperts, ...] = ("fp8", "fp8_ffn", "int4", "fused_fp8")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[StoredExperts], Path]:
    directories: dict[str, Path] = {}

    def get(stored: StoredExperts) -> Path:
        if stored not in directories:
            directories[stored] = tmp_path_factory.mktemp("wide") / stored
            make_model(directories[stored], WIDE, experts=stored)
        return directories[stored]

    return get


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def by_definition(tensors: dict[str, Tensor], linear: str) -> Tensor:
    """float32 [O, I] of a stored linear, nibble by nibble."""
    if f"{linear}.weight_packed" in tensors:
        packed, scale = tensors[f"{linear}.weight_packed"].numpy(), tensors[f"{linear}.weight_scale"].float().numpy()
        outputs, inputs = tensors[f"{linear}.weight_shape"].tolist()
        weight = np.empty((outputs, inputs), np.float32)
        for j in range(inputs // 8):
            for n in range(8):
                weight[:, 8 * j + n] = ((packed[:, j].astype(np.int64) >> (4 * n)) & 15) - 8
        return torch.from_numpy(weight * np.repeat(scale, 128, axis=1))
    weight_OI = tensors[f"{linear}.weight"].float()
    scale_O1 = tensors.get(f"{linear}.weight_scale")
    return weight_OI if scale_O1 is None else weight_OI * scale_O1.float()


def expert_by_definition(tensors: dict[str, Tensor], layer: int, expert: int) -> tuple[Tensor, Tensor]:
    prefix = f"model.layers.{layer}.feed_forward.experts."
    if prefix + "gate_up_proj" in tensors:
        gate_up = tensors[prefix + "gate_up_proj"][expert].float() * tensors[prefix + "gate_up_proj_scale"][expert]
        down = tensors[prefix + "down_proj"][expert].float() * tensors[prefix + "down_proj_scale"][expert].t()
        return gate_up.t(), down.t()
    gate, up, down = (by_definition(tensors, f"{prefix}{expert}.{part}_proj") for part in ("gate", "up", "down"))
    return torch.cat((gate, up)), down


def widened(weight: Tensor, scale: Tensor | None) -> Tensor:
    """float32 of a final weight in any form."""
    if scale is None:
        return weight.float()
    return widen_int4(weight, scale, torch.float32) if weight.dtype == torch.int32 else weight.float() * scale[:, None]


@pytest.mark.parametrize("stored", QUANTIZED)
def test_experts_are_those_of_the_definition(wide: Callable[[StoredExperts], Path], stored: StoredExperts) -> None:
    directory = wide(stored)
    index, config = validate_checkpoint(directory), read_model_config(directory)
    tensors = stored_tensors(directory)
    slots = (3, 0, 2)
    weights = load_experts(index, config, {1: slots}, torch.float32, CPU)[1]
    assert weights.down_SDF.dtype == (torch.int32 if stored == "int4" else torch.float8_e4m3fn)
    assert weights.down_scale_SD is not None
    assert weights.down_scale_SD.dtype == (torch.bfloat16 if stored == "int4" else torch.float32)
    for slot, expert in enumerate(slots):
        ours, (gate_up, down) = weights.slot(slot), expert_by_definition(tensors, 1, expert)
        assert torch.equal(widened(ours.gate_up_ND, ours.gate_up_scale_N), gate_up)
        assert torch.equal(widened(ours.down_DF, ours.down_scale_D), down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", QUANTIZED)
def test_dense_and_shared_are_those_of_the_definition(
    wide: Callable[[StoredExperts], Path], stored: StoredExperts, dtype: torch.dtype
) -> None:
    """On a CPU: INT4 is scaled and rounded once, FP8 widened exactly beside its scale."""
    directory = wide(stored)
    index, config = validate_checkpoint(directory), read_model_config(directory)
    assert config.quantizes_ffn == (stored in ("fp8_ffn", "int4"))
    tensors = stored_tensors(directory)
    layers = load_attention(index, config, dtype, CPU).layers
    for ffn, prefix in (
        (layers[0].ffn, "model.layers.0.feed_forward."),
        (layers[1].ffn.shared, "model.layers.1.feed_forward.shared_expert."),  # type: ignore[union-attr]
    ):
        assert isinstance(ffn, DenseFfn)
        assert (ffn.down_scale is None) == (stored != "fp8_ffn")
        assert ffn.gate_up_ND.dtype == ffn.down_DF.dtype == dtype
        gate, up, down = (by_definition(tensors, f"{prefix}{part}_proj") for part in ("gate", "up", "down"))
        exact = dtype if ffn.down_scale is None else torch.float32  # what is scaled later is not rounded here
        assert torch.equal(widened(ffn.gate_up_ND, ffn.gate_up_scale), torch.cat((gate, up)).to(exact).float())
        assert torch.equal(widened(ffn.down_DF, ffn.down_scale), down.to(exact).float())


@pytest.mark.parametrize("stored", QUANTIZED)
def test_dummy_weights_are_the_made_checkpoint(wide: Callable[[StoredExperts], Path], stored: StoredExperts) -> None:
    directory = wide(stored)
    index, config = validate_checkpoint(directory), read_model_config(directory)
    made = load_experts(index, config, {1: (2, 1)}, torch.float32, CPU)[1]
    dummy = dummy_experts(config, {1: (2, 1)}, torch.float32, CPU, 0, config.quantized)[1]
    for field in dataclasses.fields(made):
        assert torch.equal(getattr(made, field.name).float(), getattr(dummy, field.name).float()), field.name
    for ours, theirs in zip(
        load_attention(index, config, torch.float32, CPU).layers,
        dummy_attention(config, torch.float32, CPU, 0).layers,
        strict=True,
    ):
        pairs = [(x.ffn.shared if isinstance(x.ffn, MoeGate) else x.ffn) for x in (ours, theirs)]
        for field in dataclasses.fields(DenseFfn):
            a, b = (getattr(ffn, field.name) for ffn in pairs)
            assert (a is None and b is None) or torch.equal(a, b), field.name


def test_int4_is_near_what_it_was_made_from() -> None:
    weight_OI = torch.randn(6, 384, generator=torch.Generator().manual_seed(0))
    weight_OI[2, 128:256] = 0
    packed_OC, scale_OG = quantize_int4(weight_OI)
    assert (packed_OC.shape, scale_OG.shape) == ((6, 48), (6, 3))
    restored_OI = widen_int4(packed_OC, scale_OG, torch.float32)
    step_OI = scale_OG.float().repeat_interleave(128, dim=1)
    # Half a step of rounding; the largest positive value, at 7.5 steps, is cut to 7; bf16 keeps 8 bits of the scale.
    assert ((restored_OI - weight_OI).abs() <= 0.54 * step_OI).all()
    assert packed_OC.lt(0).any()  # the sign bit is a nibble's


def test_every_nibble_in_every_place() -> None:
    packed_OC = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32).repeat(1, 8)  # 0xFEDCBA98 is negative
    values = widen_int4(packed_OC, torch.full((1, 1), 0.5, dtype=torch.bfloat16), torch.float32)
    assert values[0, :16].tolist() == [0.5 * (nibble - 8) for nibble in range(16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_rank_on_a_cpu_holds_int4_plain(wide: Callable[[StoredExperts], Path], dtype: torch.dtype) -> None:
    directory = wide("int4")
    config, name = read_model_config(directory), str(dtype).removeprefix("torch.")
    pipeline = PipelineConfig(model=str(directory), dtype=name)  # type: ignore[arg-type]
    worker = ExpertWorker.load(config, pipeline, {1: (3, 1)}, CPU)
    slots = worker._layers[1]
    assert slots.weights.down_scale_SD is None
    gate_up, down = expert_by_definition(stored_tensors(directory), 1, 1)
    assert torch.equal(slots.weights.gate_up_SND[1], gate_up.to(dtype))
    assert torch.equal(slots.weights.down_SDF[1], down.to(dtype))
    again = ExpertWorker.load(config, pipeline, {1: (1,)}, CPU)
    assert again.proofs({1: (1,)})[1][0] == worker.proofs({1: (3, 1)})[1][1]


def test_int4_is_packed_on_a_gpu_only() -> None:
    """So a CPU's bytes of an INT4 expert are none of a GPU's, and the names under which ranks copy must differ."""
    rooms = {device: Room.on(torch.device(device), "int4", torch.bfloat16) for device in ("cpu", "cuda")}
    assert {device: room.is_packed for device, room in rooms.items()} == {"cpu": False, "cuda": True}
