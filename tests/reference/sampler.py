"""The sampler as the contract words it: one row at a time, sorted, with dictionaries and loops.

Independent of backends/: docs/contract.md (section Sampling) is its only source. Every backend's sampler is compared
with it, the fake runner's too. Numbers are float32 where the devices' are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.reference.philox import gumbel

F32 = npt.NDArray[np.float32]


@dataclass(kw_only=True)
class Row:
    """Everything that decides one token. outputs: ids generated so far."""

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    min_tokens: int = 0
    stop_ids: Sequence[int] = ()
    bias: dict[int, float] = field(default_factory=dict)
    allowed: Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    prompt: Sequence[int] = ()
    outputs: Sequence[int] = ()
    mask: Sequence[int] | None = None  # ids that a late mask allows


def sample(logits: F32, row: Row) -> int:
    """The token of one row. logits: f32 [V], raw."""
    x = process(logits.astype(np.float32), row)
    if row.temperature == 0:
        return first_largest(x)
    x = x / np.float32(row.temperature)
    x = cut_min_p(x, row.min_p)
    x = cut_top_k(x, row.top_k)
    x = cut_top_p(x, row.top_p)
    noise = np.array(gumbel(row.seed, len(row.outputs), len(x)), np.float32)
    return first_largest(x + noise)


def first_largest(x: F32) -> int:
    best = 0
    for token in range(len(x)):
        if x[token] > x[best]:
            best = token
    return best


def process(x: F32, row: Row) -> F32:
    """mask, allowed ids, bad words, minimum length, bias, repetition, frequency, presence: in this order."""
    x = x.copy()
    for allowed in (row.mask, row.allowed or None):
        if allowed is not None:
            keep = set(allowed)
            for token in range(len(x)):
                if token not in keep:
                    x[token] = -np.inf
    for word in row.bad_words:
        *prefix, last = word
        if list(row.outputs)[len(row.outputs) - len(prefix) :] == prefix and len(prefix) <= len(row.outputs):
            x[last] = -np.inf
    if len(row.outputs) < row.min_tokens:
        for token in row.stop_ids:
            x[token] = -np.inf
    for token, bias in row.bias.items():
        x[token] += np.float32(bias)
    counts = Counter(row.outputs)
    for token in set(row.prompt) | set(row.outputs):
        factor = np.float32(row.repetition)
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token, count in counts.items():
        x[token] -= np.float32(row.frequency) * np.float32(count)
        x[token] -= np.float32(row.presence)
    return x


def descending(x: F32) -> list[float]:
    return sorted((float(v) for v in x), reverse=True)


def drop_under(x: F32, threshold: float) -> F32:
    return np.where(x < np.float32(threshold), np.float32(-np.inf), x)


def cut_min_p(x: F32, min_p: float) -> F32:
    if min_p == 0:
        return x
    return drop_under(x, float(x.max()) + math.log(np.float32(min_p)))


def cut_top_k(x: F32, top_k: int) -> F32:
    if top_k == 0 or top_k >= len(x):
        return x
    return drop_under(x, descending(x)[top_k - 1])


def cut_top_p(x: F32, top_p: float) -> F32:
    """The likeliest ids until their share of what is left reaches top_p."""
    if top_p >= 1:
        return x
    ordered = descending(x)
    weights = [math.exp(v - ordered[0]) for v in ordered]
    wanted, total = float(np.float32(top_p)) * sum(weights), 0.0
    for value, weight in zip(ordered, weights, strict=True):
        total += weight
        if total >= wanted:
            return drop_under(x, value)
    return x
