"""Philox against the vectors its authors publish, and the uniforms made of it."""

import numpy as np
import pytest

from actors.attention.philox import philox4x32, uniforms


def words(text: str) -> np.ndarray:
    return np.array([[int(word, 16)] for word in text.split()], dtype=np.uint64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    assert np.array_equal(philox4x32(words(counter), words(key)), words(expected))


def test_a_column_does_not_depend_on_its_neighbours() -> None:
    seeds = np.array([0, 1, 2**32, 2**64 - 1], dtype=np.uint64)
    token_idxs = np.array([5, 2**33, 0, 7], dtype=np.uint64)
    together = uniforms(seeds, token_idxs)
    alone = [uniforms(seeds[i : i + 1], token_idxs[i : i + 1])[0] for i in range(4)]
    assert together.tolist() == alone


def test_a_uniform_is_27_bits_of_the_first_word_and_26_of_the_second() -> None:
    seed, token_idx = 0x299F31D0A4093822, 0x85A308D3243F6A88
    counter = np.array([[0x243F6A88], [0x85A308D3], [0], [0]], dtype=np.uint64)
    high, low = (int(word) for word in philox4x32(counter, words("a4093822 299f31d0"))[:2, 0])
    drawn = uniforms(np.array([seed], dtype=np.uint64), np.array([token_idx], dtype=np.uint64))[0]
    assert drawn == ((high >> 5) * 2**26 + (low >> 6)) / 2**53


def test_all_bits_of_seed_and_index_matter() -> None:
    values = {0.0}
    bits = [1 << bit for bit in range(64)]
    for bit in bits:
        one = np.array([bit], dtype=np.uint64)
        zero = np.array([0], dtype=np.uint64)
        values |= {uniforms(one, zero)[0], uniforms(zero, one)[0]}
    assert len(values) == 129


def test_uniforms_are_uniform_along_tokens_and_along_seeds() -> None:
    count = np.arange(20_000, dtype=np.uint64)
    zeros = np.zeros_like(count)
    for drawn in (uniforms(zeros, count), uniforms(count, zeros)):
        assert 0 <= drawn.min() < drawn.max() < 1
        observed = np.histogram(drawn, bins=100, range=(0, 1))[0]
        chi_square = float(((observed - 200) ** 2 / 200).sum())
        assert 50 < chi_square < 165  # 99 degrees of freedom: outside with probability 1e-4
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
