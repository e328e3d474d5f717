"""Slices of experts on a GPU, in every stored form: what they compute adds up to what whole experts compute."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.checkpoint.config import read_model_config
from actors.checkpoint.make_model import make_model
from actors.checkpoint.shapes import SHAPES, StoredExperts
from actors.checkpoint.shard import WHOLE, Shard
from actors.config import PipelineConfig
from actors.expert.worker import ExpertWorker

pytestmark = pytest.mark.gpu
NUM_EXPERTS = 4
SLOTS = {1: tuple(range(NUM_EXPERTS))}
# Terms are rounded to bf16; in FP8 a slice's hidden values have scales of their own (3 bits of mantissa).
TOLERANCE = {"fused": 0.01, "fp8": 0.05, "int4": 0.01}


@pytest.mark.parametrize("load", ["checkpoint", "dummy"])
@pytest.mark.parametrize("stored", ["fused", "fp8", "int4"])
@pytest.mark.parametrize("num_tokens", [1, 40, 700])
def test_slices_add_up(tmp_path: Path, stored: StoredExperts, load: str, num_tokens: int) -> None:
    shape = dataclasses.replace(SHAPES["tiny-wide"], num_layers=2, num_experts=NUM_EXPERTS)
    make_model(tmp_path, shape, experts=stored)
    pipeline = PipelineConfig.parse({"model": str(tmp_path), "dtype": "bfloat16", "load": load})
    config, device = read_model_config(tmp_path), torch.device("cuda")
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, config.hidden_size, generator=generator).bfloat16().to(device)
    ids_T1 = torch.randint(NUM_EXPERTS, (num_tokens, 1), generator=generator).to(device)
    slot_of_E = torch.arange(NUM_EXPERTS, device=device)

    def answer(shard: Shard) -> Tensor:
        worker = ExpertWorker.load(config, pipeline, SLOTS, device, shard=shard)
        return worker.routed(1, x_TD, ids_T1, torch.ones_like(ids_T1, dtype=x_TD.dtype), slot_of_E).float()

    whole_TD = answer(WHOLE)
    summed_TD = sum((answer(Shard(index=i, of=2)) for i in range(2)), torch.zeros_like(whole_TD))
    error = (summed_TD - whole_TD).norm() / whole_TD.norm()
    assert float(whole_TD.norm()) > 0 and float(error) < TOLERANCE[stored]
