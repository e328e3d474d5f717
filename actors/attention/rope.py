"""Rotary positions and the temperature of long contexts.

Owns the two functions of a token's absolute position that attention uses. Angles are computed per step, in fp32, as
transformers computes them (near ten million positions a table would take gigabytes, and higher precision would
differ). Knows nothing of layers, requests or caches. Source: transformers' Llama4TextRotaryEmbedding.
"""

import math

import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """fp32 [head_dim / 2]: radians per position of each interleaved pair, scaled as the model says."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is not None:
        frequencies = _scale_frequencies(frequencies, config.rope_scaling)
    return frequencies.to(device)


def _scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama-3 scaling: long waves are divided by the factor, short ones kept, those between blended.

    With low == high no wave lies between, and the blend's formula would be 0 / 0.
    """
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / scaling.factor, frequencies)
    if low == high:
        return scaled
    share = (context / wavelengths - low) / (high - low)
    blended = (1 - share) * scaled / scaling.factor + share * scaled
    between = (wavelengths <= context / low) & (wavelengths >= context / high)
    return torch.where(between, blended, scaled)


def rotations(positions_T: Tensor, frequencies_R: Tensor) -> Tensor:
    """complex64 [T, 1, R]: e^(i * position * frequency), to be broadcast over heads."""
    angles_TR = positions_T[:, None].float() * frequencies_R
    return torch.polar(torch.ones_like(angles_TR), angles_TR)[:, None]


def rotate_(x_THd: Tensor, rotations_T1R: Tensor) -> None:
    """Rotates interleaved pairs (2j, 2j+1) of every head in place; the product is taken in fp32."""
    exact_THd = x_THd.float()  # the same memory when x is fp32
    torch.view_as_complex(exact_THd.view(*x_THd.shape[:2], -1, 2)).mul_(rotations_T1R)
    if exact_THd is not x_THd:
        x_THd.copy_(exact_THd)


def temperatures(positions_T: Tensor, floor_scale: int, attn_scale: float) -> Tensor:
    """fp32 [T, 1, 1]: what queries of NoPE layers are multiplied by, 1 + a * ln(1 + floor((p + 1) / floor_scale)).

    The division is exact, in integers.
    """
    steps_T = torch.div(positions_T + 1, floor_scale, rounding_mode="floor")
    return (torch.log1p(steps_T.float()) * attn_scale + 1.0)[:, None, None]
