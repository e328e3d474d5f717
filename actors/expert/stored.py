"""An expert as stored bytes: what travels between ranks, and what its checksum is over.

Owns the order and the form of an expert's parts. On a CPU fp8 weights are held widened; here they are fp8 again, which
is exact, so that an expert has the same bytes on every device. INT4 is packed on a GPU and held plain on a CPU, from
which there is no exact way back: there what is held is what travels. Knows nothing of slots or of who asks.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.checkpoint.layouts.rules import ExpertTarget
from actors.checkpoint.quantization import ExpertFormat

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

WORD_BYTES = 8
# Half of what torch hands to a second thread: what runs beside steps on a CPU must not start a pool of its own.
CHUNK_WORDS = 16384
CHUNK_BYTES = CHUNK_WORDS * WORD_BYTES
BATCH_CHUNKS = {"cpu": 1, "cuda": 128}  # a CPU mixes in its caches, a GPU wants few large kernels
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio: odd, and multiples of it are spread evenly
_LOW_HALF = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an expert: `held` is contiguous, `stored` is the dtype that its bytes are in."""

    held: Tensor
    stored: torch.dtype

    @property
    def dtype(self) -> str:
        """The stored dtype's name, as it travels."""
        return str(self.stored).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.held.shape)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.stored.itemsize

    def read(self, begin: int, end: int) -> Tensor:
        """Stored bytes [begin, end), whole elements, as uint8 on the device: a view where it can be."""
        values = self.held.view(-1)[begin // self.stored.itemsize : end // self.stored.itemsize]
        return values.to(self.stored).view(torch.uint8)

    def write(self, begin: int, values: Tensor) -> None:
        """Overwrites the stored bytes from `begin` on with `values`, uint8 of whole elements, on the held device."""
        elements = values.view(self.stored)
        first = begin // self.stored.itemsize
        self.held.view(-1)[first : first + elements.numel()].copy_(elements)


def parts_of(expert: ExpertTarget, form: ExpertFormat) -> tuple[Part, ...]:
    """The parts in the order in which they travel: weights, then their scales. `form` is that of the checkpoint."""
    weights = (expert.gate_up_ND, expert.down_DF)
    scales = (expert.gate_up_scale_N, expert.down_scale_D)
    stored = torch.float8_e4m3fn if form == "fp8" else expert.down_DF.dtype
    return tuple(Part(w, stored) for w in weights) + tuple(Part(s, s.dtype) for s in scales if s is not None)


def checksum(parts: tuple[Part, ...]) -> int:
    """64 bits, unsigned, over dtypes, shapes and stored bytes; the same on every device for the same bytes.

    Bytes are mixed on the device in chunks; one number per chunk comes to the host. A change of one word always shows;
    any other, in values or in their places, goes unseen with a probability of about 2^-64.
    """
    digest = hashlib.blake2b(digest_size=WORD_BYTES)
    device = parts[0].held.device
    places_W = torch.arange(CHUNK_WORDS, dtype=torch.int64, device=device).mul_(_GOLDEN)
    batch_bytes = BATCH_CHUNKS[device.type] * CHUNK_BYTES
    for part in parts:
        digest.update(f"{part.dtype}{part.shape}".encode())
        sums = [
            _chunk_sums(part.read(begin, min(begin + batch_bytes, part.num_bytes)), places_W)
            for begin in range(0, part.num_bytes, batch_bytes)
        ]
        digest.update(torch.cat(sums).cpu().numpy().astype("<i8").tobytes())
    return int.from_bytes(digest.digest(), "little")


def _chunk_sums(values: Tensor, places_W: Tensor) -> Tensor:
    """Of each chunk the sum of its words, each mixed with its place; int64, wrapping. Zeros end a short one."""
    num_chunks, rest_bytes = divmod(values.numel(), CHUNK_BYTES)
    whole = values[: num_chunks * CHUNK_BYTES]
    sums = [_mixed_sums(_as_words(whole).view(num_chunks, CHUNK_WORDS), places_W)] if num_chunks else []
    if rest_bytes:
        padded = values.new_zeros(CHUNK_BYTES)
        padded[:rest_bytes] = values[num_chunks * CHUNK_BYTES :]
        sums.append(_mixed_sums(_as_words(padded).view(1, CHUNK_WORDS), places_W))
    return torch.cat(sums)


def _as_words(values: Tensor) -> Tensor:
    is_aligned = values.data_ptr() % WORD_BYTES == 0 and values.storage_offset() % WORD_BYTES == 0
    return (values if is_aligned else values.clone()).view(torch.int64)


def _mixed_sums(words_CW: Tensor, places_W: Tensor) -> Tensor:
    """Each step maps 64-bit words one to one, so that no change of a word is lost before the sum.

    Adding the place makes equal words differ; folding the high half into the low one and x -> x * (2x + 1) make every
    bit of the sum depend on all of them. Source of the last: RC6 (Rivest et al., 1998), which uses it modulo 2^32.
    """
    x_CW = words_CW + places_W
    x_CW ^= (x_CW >> 32).bitwise_and_(_LOW_HALF)
    return x_CW.mul(2).add_(1).mul_(x_CW).sum(1)
