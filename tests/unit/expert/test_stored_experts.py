"""The checksum of an expert: any damage shows, and form and device do not matter."""

import hashlib
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.checkpoint.layouts.rules import ExpertTarget
from actors.expert import stored
from actors.expert.stored import CHUNK_BYTES, CHUNK_WORDS, Part, checksum, parts_of

M64 = (1 << 64) - 1


def _expert(width: int = 10, hidden: int = 12, dtype: torch.dtype = torch.float32) -> ExpertTarget:
    generator = torch.Generator().manual_seed(0)
    return ExpertTarget(
        gate_up_ND=torch.randn(2 * width, hidden, generator=generator).to(dtype),
        down_DF=torch.randn(hidden, width, generator=generator).to(dtype),
    )


def _fp8_expert() -> ExpertTarget:
    plain = _expert()
    return ExpertTarget(
        gate_up_ND=(plain.gate_up_ND * 100).to(torch.float8_e4m3fn),
        down_DF=(plain.down_DF * 100).to(torch.float8_e4m3fn),
        gate_up_scale_N=torch.rand(20),
        down_scale_D=torch.rand(12),
    )


def _by_definition(parts: Sequence[tuple[str, tuple[int, ...], bytes]]) -> int:
    """With Python's whole numbers, one word at a time."""
    digest = hashlib.blake2b(digest_size=8)
    for dtype, shape, data in parts:
        digest.update(f"{dtype}{shape}".encode())
        for chunk in (data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)):
            total = 0
            for place in range(CHUNK_WORDS):
                word = int.from_bytes(chunk[8 * place : 8 * place + 8], "little")
                x = (word + place * 0x9E3779B97F4A7C15) & M64
                x ^= x >> 32
                total += x * (2 * x + 1)
            digest.update((total & M64).to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("values", [3, CHUNK_BYTES // 2, CHUNK_BYTES + 6])
@pytest.mark.parametrize("batch_chunks", [1, 128])
def test_checksum_by_definition(monkeypatch: pytest.MonkeyPatch, values: int, batch_chunks: int) -> None:
    """Whole and broken chunks of bf16, in batches as a CPU and as a GPU takes them."""
    monkeypatch.setitem(stored.BATCH_CHUNKS, "cpu", batch_chunks)
    x = torch.randn(values, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert checksum((Part(x, x.dtype),)) == _by_definition([("bfloat16", (values,), _bytes(x))])


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_one_flipped_bit_shows(data: st.DataObject) -> None:
    expert = _fp8_expert()
    before = checksum(parts_of(expert, "fp8"))
    part = data.draw(st.sampled_from(parts_of(expert, "fp8"))).held.view(-1).view(torch.uint8)
    part[data.draw(st.integers(0, part.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(parts_of(expert, "fp8")) != before


def _swap_rows(x: Tensor, i: int, j: int) -> None:
    x[[i, j]] = x[[j, i]]


Damage = Callable[[ExpertTarget], object]
DAMAGES: dict[str, Damage] = {
    "rows swapped": lambda e: _swap_rows(e.gate_up_ND, 3, 4),
    "first and last row swapped": lambda e: _swap_rows(e.down_DF, 0, -1),
    "gate and up swapped": lambda e: e.gate_up_ND.copy_(e.gate_up_ND.roll(e.gate_up_ND.shape[0] // 2, 0)),
    "a row twice": lambda e: e.down_DF[5].copy_(e.down_DF[4]),
    "zeroed": lambda e: e.down_DF.zero_(),
    "turned": lambda e: e.down_DF.copy_(e.down_DF.clone().view(e.down_DF.shape[::-1]).t()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("width", [10, 512])  # 512 * 1024 values: halves and rows end where chunks end
def test_damage_shows(damage: str, width: int) -> None:
    expert = _expert(width=width, hidden=12 if width == 10 else 1024)
    before = checksum(parts_of(expert, "plain"))
    DAMAGES[damage](expert)
    assert checksum(parts_of(expert, "plain")) != before


def test_swapped_words_that_differ_in_their_top_bit_show() -> None:
    """A sum of products misses such a swap: the difference times 2^63 leaves the 64 bits."""
    x = torch.tensor([1.5, 2.0, 1.5, -2.0]).repeat(100)
    before = checksum((Part(x, x.dtype),))
    swapped = x.view(-1, 2, 2).flip(1).reshape(-1)
    assert checksum((Part(swapped, x.dtype),)) != before
    one_pair = torch.cat((swapped[:4], x[4:]))
    assert checksum((Part(one_pair, x.dtype),)) != before


def test_shape_and_dtype_count() -> None:
    x = torch.arange(24, dtype=torch.float32)
    sums = {
        checksum((Part(x, x.dtype),)),
        checksum((Part(x.view(4, 6), x.dtype),)),
        checksum((Part(x.view(torch.int32), torch.int32),)),
        checksum((Part(x[:12], x.dtype), Part(x[12:], x.dtype))),
    }
    assert len(sums) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widened_fp8_has_the_bytes_of_fp8(dtype: torch.dtype) -> None:
    """Every finite value of e4m3, both zeros included, comes back from every dtype that a CPU holds it in."""
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    narrow = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wide = Part(narrow.to(dtype), torch.float8_e4m3fn)
    assert checksum((wide,)) == checksum((Part(narrow, torch.float8_e4m3fn),))
    assert wide.read(3, 200).tolist() == codes[3:200]


def test_experts_that_begin_at_any_byte() -> None:
    """Slots of an odd size lie at odd addresses of the stack; the same bytes have the same checksum everywhere."""
    row = torch.randn(CHUNK_BYTES + 15).mul_(100).to(torch.float8_e4m3fn)
    stack = row.view(torch.uint8).repeat(9, 1).view(torch.float8_e4m3fn)
    assert len({checksum((Part(stack[slot], torch.float8_e4m3fn),)) for slot in range(9)}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_pieces_put_together_are_the_part(dtype: torch.dtype) -> None:
    x = (torch.randn(7, 9) * 50).to(dtype)
    held = torch.zeros(7, 9, dtype=torch.float32)
    source, target = Part(x, dtype), Part(held, dtype)
    for begin in range(0, source.num_bytes, 8):
        target.write(begin, source.read(begin, min(begin + 8, source.num_bytes)).clone())
    assert torch.equal(held, x.float())
