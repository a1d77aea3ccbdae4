"""Rotary frequencies of every RopeSpec kind, computed once at start-up.

Each step is rounded to float32 where transformers rounds it, so the numbers agree to the last places: models were
trained with them, and at position 100,000 one unit in the last place is a hundredth of a radian. Both backends
and the numpy reference turn positions by `position * inv_freq` and multiply cos and sin by the returned factor. Kinds
that depend on the sequence length (dynamic, longrope) are fixed by the model length that the engine serves, so that
cached keys never change their meaning. Sources: YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from engine.specs.arch import RopeSpec

F32 = NDArray[np.float32]


def frequencies(rope: RopeSpec, max_model_len: int) -> tuple[F32, float]:
    """Inverse frequencies f32 [rotary_size / 2] and the factor on cos and sin, for a served length in tokens."""
    periods = powers(rope.theta, rope.rotary_size)
    plain = np.float32(1) / periods
    match rope.kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / np.float32(rope.factor), 1.0
        case "dynamic":
            return dynamic(rope, max_model_len), 1.0
        case "llama3":
            return llama3(rope, plain), 1.0
        case "yarn":
            return yarn(rope, periods), yarn_scale(rope)
        case "longrope":
            return longrope(rope, periods, max_model_len), longrope_scale(rope)


def powers(theta: float, rotary_size: int) -> F32:
    """theta ** (2i / rotary_size), f32 [rotary_size / 2]: tokens per radian."""
    exponents = np.arange(0, rotary_size, 2, dtype=np.float32) / np.float32(rotary_size)
    return np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)


def original_length(rope: RopeSpec) -> int:
    """Tokens that the model was first trained on."""
    return rope.original_max_position or rope.max_position


def dynamic(rope: RopeSpec, max_model_len: int) -> F32:
    """NTK scaling: the base grows with the served length; no change up to max_position."""
    length = max(max_model_len, rope.max_position)
    growth = rope.factor * length / rope.max_position - (rope.factor - 1)
    theta = rope.theta * float(np.float32(growth ** (rope.rotary_size / (rope.rotary_size - 2))))
    return np.float32(1) / powers(theta, rope.rotary_size)


def llama3(rope: RopeSpec, plain: F32) -> F32:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended. plain: [rotary_size / 2]."""
    one, factor = np.float32(1), np.float32(rope.factor)
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    wavelengths = np.float32(2 * math.pi) / plain
    turns = np.float32(original_length(rope)) / wavelengths  # full turns within the original length
    keep = np.clip((turns - low) / (high - low), np.float32(0), one)
    blended: F32 = (one - keep) * plain / factor + keep * plain
    return np.where(turns < low, plain / factor, np.where(turns > high, plain, blended))


def yarn(rope: RopeSpec, periods: F32) -> F32:
    """Dims that turn often are kept, dims that turn rarely interpolated, with a ramp. periods: [rotary_size / 2]."""
    size = rope.rotary_size

    def dim_of(rotations: float) -> float:
        return size * math.log(original_length(rope) / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    one = np.float32(1)
    ramp = (np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = one - np.clip(ramp, np.float32(0), one)
    inv_freq: F32 = one / (np.float32(rope.factor) * periods) * (one - keep) + one / periods * keep
    return inv_freq


def yarn_scale(rope: RopeSpec) -> float:
    """The factor on cos and sin: given, or 0.1 ln(factor) + 1, or DeepSeek's quotient of two such terms."""

    def term(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return term(rope.mscale) / term(rope.mscale_all_dim)
    return term(1.0)


def longrope(rope: RopeSpec, periods: F32, max_model_len: int) -> F32:
    """Each dim has its own divisor, from the long list when more than the original length is served."""
    factors = rope.long_factor if max_model_len > original_length(rope) else rope.short_factor
    return np.float32(1) / (np.asarray(factors, np.float32) * periods)


def longrope_scale(rope: RopeSpec) -> float:
    """The factor on cos and sin, the same for both lists."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(rope.factor) / math.log(original_length(rope))) if rope.factor > 1 else 1.0
