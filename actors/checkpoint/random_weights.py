"""Random weights that behave like a model: the same values for a name, a shape and a seed, whoever makes them.

Owns how large the numbers are, so that every peculiarity of the architecture moves the logits and greedy choices have
a margin. `make_model` writes them to disk, `load: dummy` makes them on the device; both are the same model on the same
kind of device. Knows nothing of files or of which rank asks: each tensor has a generator of its own.
"""

import hashlib
import math

import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig

FP8_MAX = float(torch.finfo(torch.float8_e4m3fn).max)  # 448

# Standard deviation of each linear's output for an input of variance one. Queries and keys are larger, so that
# attention is far from uniform; the head is larger, so that the best token stands out.
_GAINS = {"q_proj": 1.5, "k_proj": 1.5, "router": 1.5, "lm_head": 4.0}
_QUIET = 0.1  # control tokens that do not end a turn, and rows without a token, are rarely the best


def random_tensor(name: str, shape: tuple[int, ...], *, seed: int, device: torch.device) -> Tensor:
    """A stored tensor by its text-only name, fp32, out-major for linears."""
    generator = torch.Generator(device=device).manual_seed(_key(name, seed))
    values = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind.endswith("norm"):
        return values.mul_(0.1).add_(1.0)
    if kind == "embed_tokens":
        return values
    return values.mul_(_GAINS.get(kind, 1.0) / math.sqrt(shape[-1]))


def random_lm_head(config: ModelConfig, *, seed: int, device: torch.device) -> Tensor:
    """[V, D]: rows from the first control token on are quiet, except those that end a turn."""
    head_VD = random_tensor("lm_head.weight", (config.vocab_size, config.hidden_size), seed=seed, device=device)
    quiet = [i for i in range(config.bos_token_id, config.vocab_size) if i not in config.eos_token_ids]
    head_VD[quiet] *= _QUIET
    return head_VD


def random_gate_up(config: ModelConfig, layer: int, expert: int, *, seed: int, device: torch.device) -> Tensor:
    """An expert's gate_up_ND [2F, D], fp32, the gate half first."""
    prefix, shape = _expert(layer, expert), (config.expert_width, config.hidden_size)
    gate_FD = random_tensor(f"{prefix}.gate_proj.weight", shape, seed=seed, device=device)
    return torch.cat((gate_FD, random_tensor(f"{prefix}.up_proj.weight", shape, seed=seed, device=device)))


def random_down(config: ModelConfig, layer: int, expert: int, *, seed: int, device: torch.device) -> Tensor:
    """An expert's down_DF [D, F], fp32."""
    shape = (config.hidden_size, config.expert_width)
    return random_tensor(f"{_expert(layer, expert)}.down_proj.weight", shape, seed=seed, device=device)


def _expert(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.feed_forward.experts.{expert}"


def quantize_fp8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 E4M3 with one bf16-representable scale per output channel: weight ~ q * scale.

    Returns q_OI float8_e4m3fn and scale_O fp32. Source: compressed-tensors, strategy channel, symmetric, minmax.
    """
    largest_O = weight_OI.abs().amax(dim=1).clamp_(min=1e-12)
    scale_O = (largest_O / FP8_MAX).to(torch.bfloat16).float()
    scaled_OI = (weight_OI / scale_O[:, None]).clamp_(-FP8_MAX, FP8_MAX)
    return scaled_OI.to(torch.float8_e4m3fn), scale_O


def _key(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # generators take signed 64 bits
