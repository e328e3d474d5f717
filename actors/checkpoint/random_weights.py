"""Random weights that behave like a model: the same values for a name, a shape and a seed, whoever makes them.

Owns how large the numbers are, so that every peculiarity of the architecture moves the logits and greedy choices have
a margin. `make_model` writes them to disk, `load: dummy` makes them on the device; both are the same model on the same
kind of device. Knows nothing of files or of which rank asks: each tensor has a generator of its own, a large one
several, so that part of it can be made without the rest.
"""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig

BLOCK_VALUES = 1 << 26  # what one generator makes; bounds the fp32 numbers that are in memory at a time to 256 MiB

# Standard deviation of each linear's output for an input of variance one. Queries and keys are larger, so that
# attention is far from uniform; the head is larger, so that the best token stands out.
_GAINS = {"q_proj": 1.5, "k_proj": 1.5, "router": 1.5, "lm_head": 4.0}
_QUIET = 0.1  # control tokens that do not end a turn, and rows without a token, are rarely the best


def random_tensor(name: str, shape: tuple[int, ...], *, seed: int, device: torch.device) -> Tensor:
    """A stored tensor by its text-only name, fp32, out-major for linears."""
    if len(shape) == 1:
        return _random_block(name, shape, name, seed, device)
    blocks = [
        values for _, values in random_rows(name, (shape[0], shape[1]), range(shape[0]), seed=seed, device=device)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def random_rows(
    name: str, shape: tuple[int, int], rows: range, *, seed: int, device: torch.device
) -> Iterator[tuple[range, Tensor]]:
    """The given rows of `random_tensor`, fp32, in parts of at most BLOCK_VALUES numbers (or one row)."""
    step = max(1, BLOCK_VALUES // shape[1])
    for begin in range(rows.start - rows.start % step, rows.stop, step):
        block = range(begin, min(begin + step, shape[0]))
        generated = name if begin == 0 else f"{name}/{begin // step}"
        values = _random_block(generated, (len(block), shape[1]), name, seed, device)
        wanted = range(max(begin, rows.start), min(block.stop, rows.stop))
        yield wanted, values[wanted.start - begin : wanted.stop - begin]


def _random_block(generated: str, shape: tuple[int, ...], name: str, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(_key(generated, seed))
    values = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind.endswith("norm"):
        return values.mul_(0.1).add_(1.0)
    if kind == "embed_tokens":
        return values
    return values.mul_(_GAINS.get(kind, 1.0) / math.sqrt(shape[-1]))


def head_loudness(config: ModelConfig, device: torch.device) -> Tensor:
    """fp32 [V, 1], what rows of the head are multiplied with: those from the first control token on are quiet, except
    those that end a turn.
    """
    loudness_V1 = torch.ones(config.vocab_size, 1)
    loudness_V1[config.bos_token_id :] = _QUIET
    loudness_V1[list(config.eos_token_ids)] = 1.0
    return loudness_V1.to(device)


def random_lm_head(config: ModelConfig, *, seed: int, device: torch.device) -> Tensor:
    """[V, D], fp32."""
    head_VD = random_tensor("lm_head.weight", (config.vocab_size, config.hidden_size), seed=seed, device=device)
    return head_VD.mul_(head_loudness(config, device))


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


def _key(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # generators take signed 64 bits
