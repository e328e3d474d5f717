"""Weights that land on a GPU are those that land on a CPU, through pinned staging and turned on the device."""

import dataclasses
from pathlib import Path

import pytest
import torch

from actors.checkpoint.config import read_model_config
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.make_model import make_model
from actors.checkpoint.shapes import SHAPES, StoredExperts
from actors.checkpoint.weights import ExpertWeights, dummy_experts, load_attention, load_experts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("experts", ["fused", "fp8", "per_expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_to_a_gpu_is_loading_to_a_cpu(tmp_path: Path, experts: StoredExperts, dtype: torch.dtype) -> None:
    make_model(tmp_path, dataclasses.replace(SHAPES["tiny"], num_layers=2), experts=experts)
    index, config = validate_checkpoint(tmp_path), read_model_config(tmp_path)
    on_cpu, on_gpu = (load_experts(index, config, {1: (5, 0, 5)}, dtype, device)[1] for device in ("cpu", "cuda"))
    for field in dataclasses.fields(ExpertWeights):
        ours, theirs = getattr(on_gpu, field.name), getattr(on_cpu, field.name)
        assert (ours is None and theirs is None) or (ours.is_cuda and torch.equal(ours.cpu().float(), theirs.float()))
    cpu_layer = load_attention(index, config, dtype, "cpu").layers[1]
    gpu_layer = load_attention(index, config, dtype, "cuda").layers[1]
    assert torch.equal(gpu_layer.wqkv_QD.cpu(), cpu_layer.wqkv_QD)
    assert torch.equal(gpu_layer.wo_DA.cpu(), cpu_layer.wo_DA)


@pytest.mark.parametrize("fp8", [False, True])
def test_dummy_experts_on_a_gpu_do_not_depend_on_the_split(tmp_path: Path, fp8: bool) -> None:
    make_model(tmp_path, dataclasses.replace(SHAPES["tiny"], num_layers=2), experts="fp8" if fp8 else "fused")
    config = read_model_config(tmp_path)
    whole = dummy_experts(config, {1: tuple(range(8))}, torch.bfloat16, "cuda", 3, fp8)[1]
    part = dummy_experts(config, {1: (6, 2)}, torch.bfloat16, "cuda", 3, fp8)[1]
    assert torch.equal(part.gate_up_SND.float(), whole.gate_up_SND.float()[[6, 2]])
    assert torch.equal(part.down_SDF.float(), whole.down_SDF.float()[[6, 2]])
