"""Prompts for benchmarks: random token ids of given lengths, or lines of a jsonl file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.entrypoints.flags import UsageError


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """text, or token ids; the output length to ask for."""

    prompt: str | list[int]
    output_len: int


def random_lengths(rng: np.random.Generator, mean: int, ratio: float, count: int) -> list[int]:
    """Uniform in [mean * (1 - ratio), mean * (1 + ratio)], at least 1, as vLLM's random dataset."""
    low, high = int(mean * (1 - ratio)), int(mean * (1 + ratio))
    return [max(1, int(n)) for n in rng.integers(low, high + 1, count)]


def random_prompts(
    *, count: int, input_len: int, output_len: int, ratio: float, prefix_len: int, ids: Sequence[int], seed: int
) -> list[BenchPrompt]:
    """Token-id prompts drawn from `ids`, with a shared prefix of `prefix_len`."""
    rng = np.random.default_rng(seed)
    pool = np.asarray(ids, np.int64)
    prefix = rng.choice(pool, prefix_len).tolist()
    inputs = random_lengths(rng, input_len, ratio, count)
    outputs = random_lengths(rng, output_len, ratio, count)
    return [BenchPrompt([*prefix, *rng.choice(pool, n).tolist()], out) for n, out in zip(inputs, outputs, strict=True)]


def jsonl_prompts(path: str, *, count: int, output_len: int, seed: int, shuffle: bool) -> list[BenchPrompt]:
    """Lines {"prompt": text or token ids, "output_tokens": optional}. Repeats the file when it is too short."""
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--dataset-path: cannot read {path!r}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(read_row(line, path, number, output_len))
    if not rows:
        raise UsageError(f"--dataset-path: {path!r} has no lines")
    if shuffle:
        np.random.default_rng(seed).shuffle(rows)
    return [rows[i % len(rows)] for i in range(count)]


def read_row(line: str, path: str, number: int, output_len: int) -> BenchPrompt:
    try:
        row: Any = json.loads(line)
        prompt, length = row["prompt"], int(row.get("output_tokens") or output_len)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f'--dataset-path: {path}:{number} is not {{"prompt": ..., "output_tokens": N}}') from None
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(i) is int for i in prompt)):
        raise UsageError(f"--dataset-path: {path}:{number}: prompt must be a string or token ids")
    return BenchPrompt(prompt, length)
