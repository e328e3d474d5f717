"""Loaded weights are transformers' own, in our shapes; every rank reads its slices and nothing else."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.checkpoint.config import ModelConfig, read_model_config
from actors.checkpoint.index import CheckpointIndex, validate_checkpoint
from actors.checkpoint.make_model import make_model
from actors.checkpoint.quantized import quantize_fp8
from actors.checkpoint.shapes import SHAPES, ModelShape, StoredExperts, shape_config
from actors.checkpoint.weights import (
    AttentionWeights,
    DenseFfn,
    ExpertWeights,
    MoeGate,
    dummy_attention,
    dummy_experts,
    load_attention,
    load_experts,
    num_weight_bytes,
)

Made = Callable[[StoredExperts], Path]
ALL_SLOTS = {1: (0, 1, 2, 3)}


def opened(directory: Path) -> tuple[CheckpointIndex, ModelConfig]:
    return validate_checkpoint(directory), read_model_config(directory)


def same_experts(ours: ExpertWeights, theirs: ExpertWeights) -> bool:
    pairs = [(getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(ExpertWeights)]
    return all((a is None and b is None) or torch.equal(a.float(), b.float()) for a, b in pairs)


def tensors_of(weights: AttentionWeights) -> list[Tensor]:
    tensors = [weights.embed_VD, weights.final_norm_D, weights.lm_head_VD]
    for layer in weights.layers:
        tensors += [layer.input_norm_D, layer.post_norm_D, layer.wqkv_QD, layer.wo_DA]
        ffn = layer.ffn.shared if isinstance(layer.ffn, MoeGate) else layer.ffn
        tensors += [ffn.gate_up_ND, ffn.down_DF]
        tensors += [layer.ffn.router_ED] if isinstance(layer.ffn, MoeGate) else []
    return tensors


@pytest.mark.parametrize("name", ["tiny", "tiny-scout"])
@pytest.mark.parametrize("prefix", [False, True])
def test_weights_are_those_that_transformers_loads(tmp_path: Path, name: str, prefix: bool) -> None:
    make_model(tmp_path, dataclasses.replace(SHAPES[name], num_layers=4), prefix=prefix, shards=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs = {key: value.detach() for key, value in model.state_dict().items()}
    index, config = opened(tmp_path)
    ours = load_attention(index, config, torch.float32, "cpu")
    slots = {layer: tuple(range(config.num_experts)) for layer in config.moe_layers}
    experts = load_experts(index, config, slots, torch.float32, "cpu")
    assert torch.equal(ours.embed_VD, theirs.pop("model.embed_tokens.weight"))
    assert torch.equal(ours.final_norm_D, theirs.pop("model.norm.weight"))
    assert torch.equal(ours.lm_head_VD, theirs.pop("lm_head.weight"))
    for idx, layer in enumerate(ours.layers):
        mine = {key.removeprefix(f"model.layers.{idx}."): key for key in theirs if f".layers.{idx}." in key}
        get = {key: theirs.pop(full) for key, full in mine.items()}
        assert torch.equal(layer.input_norm_D, get.pop("input_layernorm.weight"))
        assert torch.equal(layer.post_norm_D, get.pop("post_attention_layernorm.weight"))
        qkv = torch.cat([get.pop(f"self_attn.{part}_proj.weight") for part in "qkv"])
        assert torch.equal(layer.wqkv_QD, qkv)
        assert torch.equal(layer.wo_DA, get.pop("self_attn.o_proj.weight"))
        if isinstance(layer.ffn, MoeGate):
            assert torch.equal(layer.ffn.router_ED, get.pop("feed_forward.router.weight"))
            check_ffn(layer.ffn.shared, get, "feed_forward.shared_expert.")
            gate_up_SDN = get.pop("feed_forward.experts.gate_up_proj")
            assert torch.equal(experts[idx].gate_up_SND, gate_up_SDN.transpose(1, 2))
            assert torch.equal(experts[idx].down_SDF, get.pop("feed_forward.experts.down_proj").transpose(1, 2))
        else:
            check_ffn(layer.ffn, get, "feed_forward.")
        assert not get
    assert not theirs  # every tensor of transformers' model is in ours
    assert sorted(experts) == list(config.moe_layers)


def check_ffn(ffn: DenseFfn, get: dict[str, Tensor], prefix: str) -> None:
    gate_up = torch.cat([get.pop(f"{prefix}{part}_proj.weight") for part in ("gate", "up")])
    assert torch.equal(ffn.gate_up_ND, gate_up)
    assert torch.equal(ffn.down_DF, get.pop(f"{prefix}down_proj.weight"))


def read_chars() -> int:
    """Bytes that this process has read with system calls so far, as the kernel counts them."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="the kernel does not count this process's reads")
@pytest.mark.parametrize("experts", ["fused", "fp8", "per_expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_reads_only_its_slices(tmp_path: Path, made: Made, experts: StoredExperts, dtype: torch.dtype) -> None:
    index, config = opened(made(experts))
    files = sum(info.num_bytes for info in index.tensors.values())
    expert_bytes = sum(info.num_bytes for name, info in index.tensors.items() if ".experts." in name) // 4
    attention_bytes = sum(info.num_bytes for name, info in index.tensors.items() if ".experts." not in name)
    assert attention_bytes + 4 * expert_bytes == files
    totals: list[int] = []
    before = read_chars()
    load_experts(index, config, {1: (2,)}, dtype, "cpu", lambda _, total: totals.append(total))
    between = read_chars()
    load_attention(index, config, dtype, "cpu", lambda _, total: totals.append(total))
    after = read_chars()
    # The kernel's own figure, less what reading /proc/self/io takes (under 200 bytes a time).
    assert expert_bytes <= between - before <= 1.02 * expert_bytes
    assert attention_bytes <= after - between <= 1.02 * attention_bytes
    assert set(totals) == {expert_bytes, attention_bytes}


@pytest.mark.parametrize("experts", ["fused", "fp8", "per_expert"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_split_of_the_slots_is_the_whole(made: Made, experts: StoredExperts, data: st.DataObject) -> None:
    index, config = opened(made(experts))
    whole = load_experts(index, config, ALL_SLOTS, torch.float32, "cpu")[1]
    order = tuple(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)))  # replicas are allowed
    part = load_experts(index, config, {1: order}, torch.float32, "cpu")[1]
    chosen = [None if values is None else values.view(torch.uint8)[list(order)].view(values.dtype)
              for values in (getattr(whole, f.name) for f in dataclasses.fields(ExpertWeights))]  # fmt: skip
    assert same_experts(part, ExpertWeights(
        gate_up_SND=chosen[0], down_SDF=chosen[1], gate_up_scale_SN=chosen[2], down_scale_SD=chosen[3]
    ))  # fmt: skip
    dummy = dummy_experts(config, {1: order}, torch.float32, "cpu", 0, form="fp8" if experts == "fp8" else "plain")[1]
    assert same_experts(part, dummy)


@pytest.mark.parametrize("slots", [{0: (0,)}, {1: (4,)}, {1: (-1,)}, {2: (0,)}])
def test_slots_that_the_model_has_not(made: Made, slots: dict[int, tuple[int, ...]]) -> None:
    index, config = opened(made("fused"))
    with pytest.raises(ValueError, match="has no experts"):
        load_experts(index, config, slots, torch.float32, "cpu")


def test_a_rank_may_hold_no_experts(made: Made) -> None:
    index, config = opened(made("fused"))
    assert load_experts(index, config, {}, torch.float32, "cpu") == {}


def test_fused_and_unfused_are_the_same_model(made: Made) -> None:
    fused, unfused = (
        load_experts(*opened(made(experts)), ALL_SLOTS, torch.float32, "cpu") for experts in ("fused", "per_expert")
    )
    assert same_experts(fused[1], unfused[1])


def test_fp8_stays_fp8_and_is_the_model_up_to_rounding(made: Made) -> None:
    fused = load_experts(*opened(made("fused")), ALL_SLOTS, torch.float32, "cpu")[1]
    fp8 = load_experts(*opened(made("fp8")), ALL_SLOTS, torch.bfloat16, "cpu")[1]
    assert fp8.gate_up_SND.dtype == fp8.down_SDF.dtype == torch.float8_e4m3fn
    assert fp8.gate_up_scale_SN is not None
    assert fp8.down_scale_SD is not None
    assert fp8.gate_up_scale_SN.dtype == fp8.down_scale_SD.dtype == torch.float32
    for quantized, scale, plain in (
        (fp8.gate_up_SND, fp8.gate_up_scale_SN, fused.gate_up_SND),
        (fp8.down_SDF, fp8.down_scale_SD, fused.down_SDF),
    ):
        error = (quantized.float() * scale[..., None] - plain).abs()
        # Three bits of mantissa: half a step is 1/16 of a normal number; below, half of the smallest step, 2^-10.
        assert (error <= plain.abs() / 16 + scale[..., None] * 2**-10 + 1e-7).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.floats(1e-6, 1e6))
def test_quantizing_keeps_the_largest_and_scales_survive_bf16(seed: int, size: float) -> None:
    weight_OI = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) * size
    weight_OI[0] = 0
    quantized_OI, scale_O = quantize_fp8(weight_OI)
    assert torch.equal(scale_O, scale_O.bfloat16().float())
    assert quantized_OI.float().abs().max() <= 448
    restored_OI = quantized_OI.float() * scale_O[:, None]
    torch.testing.assert_close(restored_OI.abs().amax(1), weight_OI.abs().amax(1), rtol=1 / 15, atol=1e-9)


def test_dtype_is_converted_once_from_what_is_stored(made: Made) -> None:
    index, config = opened(made("fused"))
    exact = load_attention(index, config, torch.float32, "cpu")
    half = load_attention(index, config, torch.bfloat16, "cpu")
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(tensors_of(exact), tensors_of(half), strict=True))
    assert num_weight_bytes(exact) == 2 * num_weight_bytes(half)


def test_dummy_weights_are_the_checkpoint_of_the_same_seed(made: Made) -> None:
    index, config = opened(made("fused"))
    loaded = load_attention(index, config, torch.float32, "cpu")
    dummy = dummy_attention(config, torch.float32, "cpu", 0)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(loaded), tensors_of(dummy), strict=True))
    other = dummy_attention(config, torch.float32, "cpu", 1)
    assert not torch.equal(other.embed_VD, dummy.embed_VD)


def test_experts_differ_from_each_other_and_between_layers() -> None:
    config = shape_config(dataclasses.replace(SHAPES["tiny-scout"], num_layers=2, num_experts=2))
    weights = dummy_experts(config, {0: (0, 1), 1: (0, 1)}, torch.float32, "cpu", 0, form="plain")
    firsts = [float(weights[layer].gate_up_SND[slot, 0, 0]) for layer in (0, 1) for slot in (0, 1)]
    assert len(set(firsts)) == 4


def test_tied_embeddings_are_one_tensor(tmp_path: Path, small_shape: ModelShape) -> None:
    make_model(tmp_path, dataclasses.replace(small_shape, tie_word_embeddings=True))
    index, config = opened(tmp_path)
    weights = load_attention(index, config, torch.float32, "cpu")
    assert weights.lm_head_VD is weights.embed_VD
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight
    assert torch.equal(weights.lm_head_VD, theirs)
    assert num_weight_bytes(weights) == sum(i.num_bytes for n, i in index.tensors.items() if ".experts." not in n)
