"""A quantized model's logits are those of transformers in fp32 that is given the numbers the formats stand for."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from actors.attention.local_model import LocalModel
from actors.checkpoint.make_model import make_model
from actors.checkpoint.quantized import widen_int4
from actors.checkpoint.shapes import SHAPES, StoredExperts, config_json
from actors.config import PipelineConfig

SHAPE = dataclasses.replace(SHAPES["tiny-wide"], chunk_tokens=16)
TOLERANCE = 1e-3  # as for plain models: 30 times fp32 noise, 45 times below the smallest known mistake


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the stored tensors stand for, by the names of an unquantized model; experts fused."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        linear, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            plain[f"{linear}.weight"] = widen_int4(tensor, tensors[f"{linear}.weight_scale"], torch.float32)
        elif kind == "weight":
            scale = tensors.get(f"{linear}.weight_scale")
            plain[name] = tensor.float() * (1 if scale is None else scale.float())
    for layer in range(1, SHAPE.num_layers, SHAPE.moe_interval):
        prefix = f"model.layers.{layer}.feed_forward.experts."
        experts = [
            [plain.pop(f"{prefix}{e}.{part}_proj.weight").t() for part in ("gate", "up", "down")]
            for e in range(SHAPE.num_experts)
        ]
        plain[prefix + "gate_up_proj"] = torch.stack([torch.cat((gate, up), 1) for gate, up, _ in experts])
        plain[prefix + "down_proj"] = torch.stack([down for _, _, down in experts])
    return plain


def rounded(x: Tensor) -> Tensor:
    """Through FP8 and back, with one scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


class RoundingExperts(Llama4TextExperts):  # type: ignore[misc]  # transformers has no types
    """Experts whose linears round what they are given, as FP8 ones do."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = rounded(hidden_states.view(self.gate_up_proj.shape[0], -1, self.hidden_size))
        gate, up = torch.bmm(x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(rounded(up * self.act_fn(gate)), self.down_proj).view(-1, self.hidden_size)


def reference(directory: Path, stored: StoredExperts) -> nn.Module:
    tensors: dict[str, Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= load_file(shard)
    config = transformers.Llama4TextConfig(**config_json(SHAPE))
    config._attn_implementation = "eager"
    model = transformers.Llama4ForCausalLM(config).eval()
    model.load_state_dict(numbers(tensors), strict=True)
    if stored == "int4":
        return model
    for name, module in model.named_modules():
        if isinstance(module, Llama4TextExperts):
            module.__class__ = RoundingExperts
        elif stored == "fp8_ffn" and isinstance(module, nn.Linear) and "feed_forward" in name and "router" not in name:
            module.register_forward_pre_hook(lambda _, args: rounded(args[0]))
    return model


def both_logits(directory: Path, stored: StoredExperts) -> tuple[Tensor, Tensor]:
    make_model(directory, SHAPE, experts=stored, seed=7)
    draw = random.Random(5)
    ids = [draw.randrange(SHAPE.base_vocab) for _ in range(40)]
    with torch.inference_mode():
        theirs = reference(directory, stored)(torch.tensor([ids]), use_cache=False).logits[0]
    pipeline = PipelineConfig(model=str(directory), kv_cache_bytes=4 << 20, page_tokens=4)
    return LocalModel.load(pipeline).logits(ids), theirs


def test_int4(tmp_path: Path) -> None:
    ours, theirs = both_logits(tmp_path, "int4")
    assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("stored", ["fp8", "fp8_ffn"])
def test_fp8(tmp_path: Path, stored: StoredExperts) -> None:
    """The last bit of fp32 may tip a value by one step of e4m3, which is 6 %: a few positions may differ by that."""
    ours, theirs = both_logits(tmp_path, stored)
    differences_T = (ours - theirs).abs().amax(1)
    assert differences_T.median() < TOLERANCE
    assert differences_T.max() < 0.3
