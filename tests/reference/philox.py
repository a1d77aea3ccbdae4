"""Philox-4x32-10 on Python integers: the words of the paper (Salmon et al., SC 2011), one counter at a time.

The integers that every backend must produce; slow and plain on purpose.
"""

from __future__ import annotations

import math

import numpy as np

Words = tuple[int, int, int, int]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Four random 32-bit words."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * a, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = high1 ^ b ^ k, low1, high0 ^ d ^ m, low0
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


def uniform(seed: int, output_idx: int, token: int, stream: int = 0) -> float:
    """In (0, 1): 23 bits and a half, so that neither end is reached in float32."""
    word = philox((output_idx, token >> 2, stream, 0), (seed % 2**32, seed >> 32))[token & 3]
    return ((word >> 9) + 0.5) * 2.0**-23


def gumbel(seed: int, output_idx: int, vocab_size: int) -> list[float]:
    """Noise of one output, rounded to float32 where a device rounds."""
    noise = []
    for token in range(vocab_size):
        inner = np.float32(-math.log(uniform(seed, output_idx, token)))
        noise.append(float(np.float32(-math.log(inner))))
    return noise
