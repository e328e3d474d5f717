"""Counter-based random numbers: Philox4x32-10.

Owns the map (seed, token index) -> uniform. Holds no state, so a request draws the same numbers in any batch, in any
order and after a replay. Runs on the host: the index of a token is known before the token is, and integers of 64 bits
are exact there whatever the device. Knows nothing of tokens' probabilities.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 10
LOW_32 = np.uint64(0xFFFFFFFF)
SHIFT_32 = np.uint64(32)
# Row 0 belongs to counter words 0 and 1, row 1 to words 2 and 3.
MULTIPLIERS_21 = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
KEY_STEPS_21 = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)


def philox4x32(counter_4N: NDArray[np.uint64], key_2N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Encrypts N counters. Words are of 32 bits, each in its own uint64; returns [4, N] likewise."""
    even_2N, odd_2N, round_key_2N = counter_4N[0::2], counter_4N[1::2], key_2N
    for _ in range(NUM_ROUNDS):
        product_2N = MULTIPLIERS_21 * even_2N
        even_2N, odd_2N = (product_2N[::-1] >> SHIFT_32) ^ odd_2N ^ round_key_2N, product_2N[::-1] & LOW_32
        round_key_2N = (round_key_2N + KEY_STEPS_21) & LOW_32
    return np.stack((even_2N[0], odd_2N[0], even_2N[1], odd_2N[1]))


def uniforms(seeds_N: NDArray[np.uint64], token_idxs_N: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, token index), of 53 random bits.

    The seed is the key, low word first; the index is counter words 0 and 1, low word first; words 2 and 3 are zero.
    """
    zeros_N = np.zeros_like(token_idxs_N)
    counter_4N = np.stack((token_idxs_N & LOW_32, token_idxs_N >> SHIFT_32, zeros_N, zeros_N))
    words_4N = philox4x32(counter_4N, np.stack((seeds_N & LOW_32, seeds_N >> SHIFT_32)))
    bits_53_N = (words_4N[0] >> np.uint64(5) << np.uint64(26)) | (words_4N[1] >> np.uint64(6))
    result: NDArray[np.float64] = bits_53_N.astype(np.float64) * 2.0**-53
    return result
