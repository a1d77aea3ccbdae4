"""The prompts of bench/cpu.py and of its peers' sides: nothing but numpy, since they run in other environments."""

from __future__ import annotations

import numpy as np

PROMPT, OUTPUTS, PREFILL = 64, 64, 1000


def prompts(streams: int, length: int, vocab_size: int) -> np.ndarray:
    """i32 [streams, length]."""
    return np.random.default_rng(streams).integers(3, vocab_size, (streams, length), dtype=np.int32)
