"""Token buckets by a cost model: the padded sizes that a number of compiled programs buys the most with. Pure.

A step of T tokens takes, by a chip's data sheet, max(weights / bandwidth, products / peak) and its logits; attention
reads true lengths and sees no padding. Below some hundred tokens a step costs what reading the weights costs, so that
small buckets save logits alone; above, a padded token costs what a real one does. Sizes are chosen so that the mean of
padded over exact time is least where every octave of T is as frequent as the next. Called by resolve.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from engine.runner import DeviceInfo
from engine.specs.arch import ArchSpec
from engine.specs.chips import chip_of, chips_of_kind
from engine.specs.parallel import shard_shape
from engine.specs.weights import param_table

LOGIT_BYTES = 35 * 4
"""A float32 logit is passed 3 times by a greedy step, 67 by one with a top-p (32 halvings over two arrays): between."""
GRAINS = ((8, 64), (16, 256), (64, 1024), (128, 4096), (512, 1 << 20))
"""(multiples, up to): what may be a bucket, besides powers of two."""
HOST = (2e10, 2e11)  # bytes and operations a second of a CPU, roughly
TOKEN_BUCKETS = 10  # where a program takes long to compile
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of a padded step on one device. max_rows: most rows that a step samples."""

    weights_s: float  # all weights read once
    token_s: float  # products of one token, the head left out
    head_s: float  # the head's product for one row
    logits_s: float  # logits of one row written and read
    max_rows: int

    def seconds(self, tokens: int | npt.NDArray[np.int64]) -> F64:
        count = np.asarray(tokens, np.float64)
        rows = np.minimum(count, self.max_rows)
        products = count * self.token_s + rows * self.head_s
        return np.asarray(np.maximum(self.weights_s, products) + rows * self.logits_s)


def step_cost(arch: ArchSpec, item: int, ranks: int, speed: tuple[float, float], max_rows: int) -> StepCost:
    """item: bytes of a plain weight's number. speed: bytes and operations a second of one device."""
    (bandwidth, peak), vocab = speed, -(-arch.vocab_size // ranks)
    head = "embed" if arch.tied_embeddings else "head"
    stored = sum(prod(shard_shape(param, ranks, 0)) * BYTES.get(param.dtype or "", item) for param in param_table(arch))
    if not arch.tied_embeddings:
        stored -= vocab * arch.hidden_size * item  # of the embedding a step reads its tokens' rows
    numbers = sum(
        prod(shard_shape(param, ranks, 0))
        for param in param_table(replace(arch, quant=None))
        if len(param.shape) == 2 and param.name not in ("embed", head)
    )
    return StepCost(
        weights_s=stored / bandwidth,
        token_s=2 * numbers / peak,
        head_s=2 * vocab * arch.hidden_size / peak,
        logits_s=LOGIT_BYTES * vocab / bandwidth,
        max_rows=max_rows,
    )


BYTES = {"int8": 1, "uint8": 1, "float8_e4m3": 1, "int32": 4, "int64": 8, "float32": 4}
"""Of a number of a parameter that is kept in few bits, or beside one that is."""


def slowdown(cost: StepCost, buckets: tuple[int, ...]) -> float:
    """The mean of padded over exact seconds, every octave of tokens as frequent as the next; 1 = no padding."""
    weights, totals = sums(cost, buckets[-1])
    ends = np.array(buckets)
    begins = np.concatenate(([0], ends[:-1]))
    return float((cost.seconds(ends) * (totals[ends] - totals[begins])).sum() / weights)


def sums(cost: StepCost, largest: int) -> tuple[float, F64]:
    """(total weight, [largest + 1] sums of weight over exact seconds of steps of at most so many tokens)."""
    tokens = np.arange(1, largest + 1)
    weights = 1 / tokens
    return float(weights.sum()), np.concatenate(([0.0], np.cumsum(weights / cost.seconds(tokens))))


def candidates(required: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes to choose from, the last of `required` the largest."""
    largest = max(required)
    found = {*required, *(1 << n for n in range(largest.bit_length()))}
    first = 0
    for grain, last in GRAINS:
        found.update(range(first + grain, min(last, largest) + 1, grain))
        first = last
    return tuple(sorted(size for size in found if size <= largest))


def choose_buckets(cost: StepCost, required: tuple[int, ...], most: int) -> tuple[int, ...]:
    """At most `most` sizes with the least slowdown, `required` among them, the largest of which is the last.

    By dynamic programming over the candidates: exact.
    """
    sizes = np.array(candidates(required))
    _, totals = sums(cost, int(sizes[-1]))
    seconds, upto = cost.seconds(sizes), totals[sizes]
    needed = np.isin(sizes, required)
    # of the sizes before each, the last that may not be left out; what ends there begins behind it
    last = np.concatenate(([-1], np.maximum.accumulate(np.where(needed, np.arange(len(sizes)), -1))[:-1]))
    best = np.where(last < 0, seconds * upto, np.inf)  # one bucket from 0 on
    before: list[npt.NDArray[np.int64]] = []
    answers = [best[-1]]
    for _ in range(1, min(most, len(sizes))):
        # [to, from]: a bucket that holds steps of more tokens than `from` holds
        whole = best[None, :] + seconds[:, None] * (upto[:, None] - upto[None, :])
        at = np.arange(len(sizes))
        allowed = (at[None, :] < at[:, None]) & (at[None, :] >= last[:, None])
        whole = np.where(allowed, whole, np.inf)
        before.append(whole.argmin(axis=1))
        best = whole.min(axis=1)
        answers.append(best[-1])
    count = int(np.argmin(answers))
    at_last, chosen = len(sizes) - 1, [int(sizes[-1])]
    for step in range(count - 1, -1, -1):
        at_last = int(before[step][at_last])
        chosen.append(int(sizes[at_last]))
    return tuple(reversed(chosen))


def most_turns(cost: StepCost, most: int, limit_s: float) -> int:
    """As many decode turns as take at most `limit_s` together where one row decodes, one to `most`."""
    return max(1, min(most, int(limit_s / float(cost.seconds(1)))))


def resolve_cost(arch: ArchSpec, item: int, ranks: int, device: DeviceInfo, seqs: int) -> StepCost | None:
    """What a step takes: of a TPU by its data sheet, of one that nobody knows by the slowest; of a CPU roughly.

    item: bytes of a plain weight's number.
    """
    if device.kind == "cpu":
        return step_cost(arch, item, ranks, HOST, seqs)
    if device.kind != "tpu":
        return None
    chip = chip_of(device.name) or min(chips_of_kind("tpu"), key=lambda chip: chip.bandwidth)
    return step_cost(arch, item, ranks, (chip.bandwidth, chip.flops["bfloat16"]), seqs)


def resolve_buckets(
    device: DeviceInfo, seqs: int, batched: int, cost: StepCost | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(row buckets, token buckets), ascending; empty where the device takes any shape."""
    if device.bucket_style == "exact":
        return (), ()
    if cost is not None and device.kind == "tpu":
        powers = {*powers_to(1, seqs), *powers_to(64, batched)}
        tokens = choose_buckets(cost, tuple(sorted({seqs, batched})), min(TOKEN_BUCKETS, len(powers)))
        return tuple(size for size in tokens if size <= seqs), tokens
    # decode steps have one token a row; beyond that, prefill chunks
    if device.kind == "cpu":  # a program costs a second or two to compile, a few padded rows next to nothing
        rows = tuple(n for n in powers_to(1, seqs) if n != 2 or seqs == 2)
        chunks = powers_to(128, batched, 4)
    else:
        rows = powers_to(1, seqs)
        chunks = powers_to(64, batched)
    return rows, tuple(sorted({*rows, *chunks}))


def powers_to(first: int, last: int, factor: int = 2) -> tuple[int, ...]:
    """first, factor * first, ... and `last` itself."""
    values = []
    while first < last:
        values.append(first)
        first *= factor
    return (*values, last)
