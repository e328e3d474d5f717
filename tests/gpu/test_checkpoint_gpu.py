"""Weights that land on a GPU are those that land on a CPU, through pinned staging and turned on the device."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.checkpoint import reader
from actors.checkpoint.config import read_model_config
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.make_model import make_model
from actors.checkpoint.quantized import widen_int4
from actors.checkpoint.shapes import SHAPES, StoredExperts
from actors.checkpoint.weights import (
    AttentionWeights,
    DenseFfn,
    ExpertWeights,
    MoeGate,
    Shard,
    dummy_attention,
    dummy_experts,
    load_attention,
    load_experts,
)

pytestmark = pytest.mark.gpu

SHAPE = dataclasses.replace(SHAPES["tiny-wide"], num_layers=2)
STORED: tuple[StoredExperts, ...] = ("fused", "per_expert", "fp8", "fp8_ffn", "int4", "fused_fp8")


def _ffns(weights: AttentionWeights) -> Iterator[DenseFfn]:
    for layer in weights.layers:
        yield layer.ffn.shared if isinstance(layer.ffn, MoeGate) else layer.ffn


def _numbers(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a final weight stands for, on the CPU: INT4 as a CPU holds it, FP8 beside its scale."""
    if weight.dtype == torch.int32:
        assert scale is not None
        return widen_int4(weight.cpu(), scale.cpu(), dtype).float()
    return weight.cpu().float()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_to_a_gpu_is_loading_to_a_cpu(
    tmp_path: Path, stored: StoredExperts, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks far smaller than a tensor, so that every staging buffer is used many times."""
    monkeypatch.setitem(reader.BLOCK_BYTES, "cuda", 4096)
    monkeypatch.setitem(reader.READS_IN_FLIGHT, "cuda", 3)
    make_model(tmp_path, SHAPE, experts=stored)
    index, config = validate_checkpoint(tmp_path), read_model_config(tmp_path)
    on_cpu, on_gpu = (load_experts(index, config, {1: (3, 0, 3)}, dtype, device)[1] for device in ("cpu", "cuda"))
    for field in dataclasses.fields(ExpertWeights):
        ours, theirs = getattr(on_gpu, field.name), getattr(on_cpu, field.name)
        assert (ours is None and theirs is None) or (ours.is_cuda and torch.equal(ours.cpu().float(), theirs.float()))
    shard = Shard(index=1, of=2)
    cpu, gpu = (load_attention(index, config, dtype, device, shard=shard) for device in ("cpu", "cuda"))
    for ours, theirs in zip(gpu.layers, cpu.layers, strict=True):
        assert torch.equal(ours.wqkv_QD.cpu(), theirs.wqkv_QD)
        assert torch.equal(ours.wo_DA.cpu(), theirs.wo_DA)
    for ours_ffn, theirs_ffn in zip(_ffns(gpu), _ffns(cpu), strict=True):
        gate_up = _numbers(ours_ffn.gate_up_ND, ours_ffn.gate_up_scale, dtype)
        assert torch.equal(gate_up, theirs_ffn.gate_up_ND.float())
        assert torch.equal(_numbers(ours_ffn.down_DF, ours_ffn.down_scale, dtype), theirs_ffn.down_DF.float())
        assert (ours_ffn.down_scale is not None) == (stored in ("fp8_ffn", "int4"))


def test_requantized_while_loading(tmp_path: Path) -> None:
    make_model(tmp_path, SHAPE, experts="fp8", dtype="bfloat16")
    index, config = validate_checkpoint(tmp_path), read_model_config(tmp_path)
    cpu, gpu = (load_attention(index, config, torch.bfloat16, device, quantize_ffn="fp8") for device in ("cpu", "cuda"))
    for ours, theirs in zip(_ffns(gpu), _ffns(cpu), strict=True):
        assert ours.down_DF.dtype == torch.float8_e4m3fn
        for name in ("gate_up_scale", "down_scale"):
            assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name))
        for name in ("gate_up_ND", "down_DF"):
            a, b = getattr(ours, name).cpu().float(), getattr(theirs, name).float()
            assert (a != b).float().mean() < 1e-3  # a division's last bit may tip a value by one step of e4m3
            assert torch.allclose(a, b, rtol=0.13, atol=0.01)


@pytest.mark.parametrize("form", ["plain", "fp8", "int4"])
def test_dummy_experts_on_a_gpu_do_not_depend_on_the_split(tmp_path: Path, form: str) -> None:
    make_model(tmp_path, SHAPE)
    config = read_model_config(tmp_path)
    whole = dummy_experts(config, {1: tuple(range(4))}, torch.bfloat16, "cuda", 3, form)[1]  # type: ignore[arg-type]
    part = dummy_experts(config, {1: (2, 0)}, torch.bfloat16, "cuda", 3, form)[1]  # type: ignore[arg-type]
    assert torch.equal(part.gate_up_SND.float(), whole.gate_up_SND.float()[[2, 0]])
    assert torch.equal(part.down_SDF.float(), whole.down_SDF.float()[[2, 0]])


def test_dummy_shards_on_a_gpu_are_parts_of_one_model(tmp_path: Path) -> None:
    make_model(tmp_path, SHAPE, experts="fp8_ffn")
    config = read_model_config(tmp_path)
    whole = dummy_attention(config, torch.bfloat16, "cuda", 3)
    shards = [dummy_attention(config, torch.bfloat16, "cuda", 3, shard=Shard(index=i, of=2)) for i in range(2)]
    assert torch.equal(torch.cat([shard.lm_head_VD for shard in shards]), whole.lm_head_VD)
    assert torch.equal(torch.cat([shard.layers[0].wo_DA for shard in shards], 1), whole.layers[0].wo_DA)
    downs = [next(_ffns(shard)).down_DF.view(torch.uint8) for shard in shards]
    assert torch.equal(torch.cat(downs, 1), next(_ffns(whole)).down_DF.view(torch.uint8))
