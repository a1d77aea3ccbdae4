"""Rotary frequencies of every RopeSpec kind, computed once at start-up in float64 and rounded to float32.

Both backends and the numpy reference turn positions by `position * inv_freq` and multiply cos and sin by the returned
attention scale. Kinds that depend on the sequence length (dynamic, longrope) are fixed by the model length that the
engine serves, so that cached keys never change their meaning. Sources: transformers' rope definitions; YaRN
(arXiv 2309.00071), LongRoPE (arXiv 2402.13753), NTK-aware scaling.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from engine.specs.arch import RopeSpec

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def frequencies(rope: RopeSpec, max_model_len: int) -> tuple[F32, float]:
    """Inverse frequencies f32 [rotary_size / 2] and the factor on cos and sin, for a served length in tokens."""
    plain = base_frequencies(rope.theta, rope.rotary_size)
    scale = 1.0
    match rope.kind:
        case "default":
            inv_freq = plain
        case "linear":
            inv_freq = plain / rope.factor
        case "dynamic":
            inv_freq = dynamic(rope, max_model_len)
        case "llama3":
            inv_freq = llama3(rope, plain)
        case "yarn":
            inv_freq, scale = yarn(rope, plain)
        case "longrope":
            inv_freq, scale = longrope(rope, plain, max_model_len)
    return inv_freq.astype(np.float32), scale


def base_frequencies(theta: float, rotary_size: int) -> F64:
    """theta ** (-2i / rotary_size), f64 [rotary_size / 2]."""
    return theta ** (-np.arange(0, rotary_size, 2, dtype=np.float64) / rotary_size)


def original_length(rope: RopeSpec) -> int:
    """Tokens that the model was first trained on."""
    return rope.original_max_position or rope.max_position


def dynamic(rope: RopeSpec, max_model_len: int) -> F64:
    """NTK scaling: the base grows with the served length; no change up to max_position."""
    length = max(max_model_len, rope.max_position)
    growth = rope.factor * length / rope.max_position - (rope.factor - 1)
    theta = rope.theta * growth ** (rope.rotary_size / (rope.rotary_size - 2))
    return base_frequencies(theta, rope.rotary_size)


def llama3(rope: RopeSpec, plain: F64) -> F64:
    """Long wavelengths are divided by `factor`, short ones kept, those between are blended. plain: [rotary_size / 2]."""
    turns = original_length(rope) * plain / (2 * math.pi)  # full turns within the original length
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    blended: F64 = keep * plain + (1 - keep) * plain / rope.factor
    return blended


def yarn(rope: RopeSpec, plain: F64) -> tuple[F64, float]:
    """Dims that turn often are kept, dims that turn rarely interpolated, with a linear ramp. plain: [rotary_size / 2]."""
    size = rope.rotary_size

    def dim_of(rotations: float) -> float:
        return size * math.log(original_length(rope) / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    interpolate = np.clip((np.arange(size // 2) - low) / (high - low), 0.0, 1.0)
    inv_freq: F64 = interpolate * plain / rope.factor + (1 - interpolate) * plain
    return inv_freq, yarn_scale(rope)


def yarn_scale(rope: RopeSpec) -> float:
    """The factor on cos and sin: given, or 0.1 ln(factor) + 1, or DeepSeek's quotient of two such terms."""

    def term(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return term(rope.mscale) / term(rope.mscale_all_dim)
    return term(1.0)


def longrope(rope: RopeSpec, plain: F64, max_model_len: int) -> tuple[F64, float]:
    """Each dim has its own divisor, from the long list when more than the original length is served."""
    factors = rope.long_factor if max_model_len > original_length(rope) else rope.short_factor
    inv_freq: F64 = plain / np.asarray(factors, np.float64)
    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    if rope.factor <= 1:
        return inv_freq, 1.0
    return inv_freq, math.sqrt(1 + math.log(rope.factor) / math.log(original_length(rope)))
