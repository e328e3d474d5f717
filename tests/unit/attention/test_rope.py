"""Rotation and temperature against transformers, near position 0 and near ten million, and by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch

from actors.attention.rope import inverse_frequencies, rotate_, rotations, temperatures
from actors.checkpoint.config import RopeScaling
from actors.checkpoint.shapes import SHAPES, ModelShape, config_json, shape_config

CPU = torch.device("cpu")
POSITIONS = torch.tensor([0, 1, 2, 8191, 8192, 131071, 1048575, 9_999_999, 10_485_759])
BLENDED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
SHAPE_CASES = {
    "maverick": SHAPES["maverick"],
    "scout": SHAPES["scout"],
    "blended": replace(SHAPES["scout"], rope_scaling=BLENDED),
}


def _transformers_config(shape: ModelShape) -> object:
    from transformers import Llama4TextConfig

    values = json.loads(json.dumps(config_json(shape)))
    return Llama4TextConfig(**{k: v for k, v in values.items() if k != "architectures"})


@pytest.mark.parametrize("name", SHAPE_CASES)
def test_rotation_equals_transformers(name: str) -> None:
    from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding, apply_rotary_emb

    shape = SHAPE_CASES[name]
    config = shape_config(shape)
    x_THd = torch.randn(len(POSITIONS), 6, config.head_dim, generator=torch.Generator().manual_seed(0))
    theirs_rotations = Llama4TextRotaryEmbedding(_transformers_config(shape))(x_THd, POSITIONS[None])
    theirs, _ = apply_rotary_emb(x_THd[None], x_THd[None], theirs_rotations)
    rotate_(x_THd, rotations(POSITIONS, inverse_frequencies(config, CPU)))
    assert torch.allclose(x_THd, theirs[0], atol=1e-6, rtol=0)


def test_scaled_pairs_of_scout() -> None:
    """29 of the 64 pairs (35 and up) have waves longer than 8192 tokens and turn 16 times slower."""
    config = shape_config(SHAPES["scout"])
    plain = inverse_frequencies(replace(config, rope_scaling=None), CPU)
    ratio = plain / inverse_frequencies(config, CPU)
    assert torch.equal(ratio, torch.where(torch.arange(64) >= 35, 16.0, 1.0))


def test_pairs_are_neighbours() -> None:
    """A quarter turn takes (x0, x1) to (-x1, x0), in place and for bf16 as well."""
    quarter_T1R = torch.tensor([[[1j, 1.0]]], dtype=torch.complex64)
    for dtype in (torch.float32, torch.bfloat16):
        x_THd = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=dtype)
        rotate_(x_THd, quarter_T1R)
        assert x_THd.tolist() == [[[-2.0, 1.0, 3.0, 4.0]]]


def test_a_slice_of_heads_is_rotated_where_it_lies() -> None:
    x_THd = torch.ones(3, 5, 4)
    rotate_(x_THd[:, :2], torch.full((3, 1, 2), -1.0, dtype=torch.complex64))
    assert (x_THd[:, :2] == -1).all()
    assert (x_THd[:, 2:] == 1).all()


@pytest.mark.parametrize(
    "position, expected",
    [(0, 1.0), (8190, 1.0), (8191, 1.0693), (16382, 1.0693), (16383, 1.1099), (131071, 1.2833), (10485759, 1.7155)],
)
def test_temperature_by_hand(position: int, expected: float) -> None:
    assert temperatures(torch.tensor([position]), 8192, 0.1).item() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("floor_scale", [8, 8192])
def test_temperature_equals_transformers_formula_everywhere_near_its_steps(floor_scale: int) -> None:
    steps = torch.tensor([1, 2, 3, 100, 10_485_760 // floor_scale]) * floor_scale
    positions = torch.cat([steps - 2, steps - 1, steps])
    theirs = torch.log1p(torch.floor((positions.float() + 1.0) / floor_scale)) * 0.1 + 1.0
    assert torch.equal(temperatures(positions, floor_scale, 0.1).flatten(), theirs)


def test_temperature_steps_at_p_plus_one() -> None:
    at, after = temperatures(torch.tensor([6, 7]), 8, 0.1).flatten().tolist()
    assert at == 1.0
    assert after == pytest.approx(1 + 0.1 * math.log(2))
