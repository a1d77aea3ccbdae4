"""The "model" of the fake runner: logits that are a hash of a sequence's digest. Options of the fake runner.

Always true: equal digest, salt and seed give equal logits, bit for bit; the likeliest id is known without the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from backends.fake_pages import mix64
from backends.fake_sampling import Bool, log_softmax
from engine.errors import StepFailed, check
from engine.runner import Capability
from engine.specs.arch import ArchSpec
from engine.step import F32, I32, U32, U64, Logprobs

PEAK = np.float32(8.5)  # logit of the likeliest id; the others lie in [0, 8)
POOLED_WIDTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeOptions:
    """What a test may choose. Keyword arguments of backends.fake.Runner.

    latency_s: a step takes this long after the one before it.
    eos_probability: how often the likeliest token is the first eos id; None = as the hash falls.
    fail_at: step_id -> the StepFailed that its collect raises.
    non_finite_at: step_id -> rows reported with RowError.NON_FINITE.
    transfer_turns: a transfer ends this many steps or polls after it began.
    fail_transfers: ids of transfers that fail.
    """

    latency_s: float = 0.0
    eos_probability: float | None = None
    fail_at: Mapping[int, StepFailed] = field(default_factory=dict)
    non_finite_at: Mapping[int, Sequence[int]] = field(default_factory=dict)
    transfer_turns: int = 2
    fail_transfers: frozenset[int] = frozenset()
    memory_bytes: int = 1 << 30
    capabilities: frozenset[Capability] = frozenset(Capability) - {Capability.EXECUTABLES}
    max_in_flight: int = 2
    page_tokens: int = 16
    bucket_style: str = "pow2"


class HashModel:
    """Logits of a vocabulary of V ids."""

    def __init__(self, arch: ArchSpec, seed: int, eos_probability: float | None) -> None:
        self.vocab_size, self.eos = arch.vocab_size, arch.eos_token_ids
        self.seed, self.eos_probability = seed, eos_probability

    def hash(self, digest: U64, salt: U64) -> U64:
        """What a model with this seed makes of a sequence. -> u64 [n]."""
        return mix64(digest + salt + np.uint64(self.seed % 2**64) * np.uint64(0x9E3779B97F4A7C15))

    def peak(self, hashes: U64) -> I32:
        """The likeliest id of each hash, [n]."""
        bits = mix64(hashes ^ np.uint64(0xA5A5A5A5A5A5A5A5))
        ids = (bits % np.uint64(self.vocab_size)).astype(np.int32)
        if self.eos_probability is not None and self.eos:
            for e in self.eos:
                ids[ids == e] = (e + 1) % self.vocab_size
            chance = (bits >> np.uint64(40)).astype(np.float64) * 2.0**-24
            ids[chance < self.eos_probability] = self.eos[0]
        return ids

    def logits(self, hashes: U64) -> F32:
        """f32 [n, V]."""
        v = np.arange(self.vocab_size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        values: F32 = (mix64(hashes[:, None] + v) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-21)
        values[np.arange(len(hashes)), self.peak(hashes)] = PEAK
        return values

    def pooled(self, hashes: U64) -> F32:
        """f32 [n, POOLED_WIDTH] in [0, 1)."""
        places: U64 = np.arange(POOLED_WIDTH).astype(np.uint64)
        bits = mix64(np.add(hashes[:, None], places, dtype=np.uint64))
        values: F32 = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        return values


def pick_logprobs(logits: F32, chosen: I32, num_top: int) -> Logprobs:
    """logits: f32 [n, V]; chosen: i32 [n]. Equal logits are ordered by id."""
    rows = np.arange(len(logits))
    scores = log_softmax(logits)
    own = logits[rows, chosen]
    top_ids = np.argsort(-logits, axis=-1, kind="stable")[:, :num_top].astype(np.int32)
    return Logprobs(
        chosen=scores[rows, chosen],
        rank=(logits > own[:, None]).sum(axis=-1).astype(np.int32) + 1,
        top_ids=top_ids,
        top=np.take_along_axis(scores, top_ids, axis=-1),
    )


def unpack_mask(bits: U32, vocab_size: int) -> Bool:
    """bool [n, V] of u32 [n, ceil(V / 32)]: bit v % 32 of word v // 32 set = allowed."""
    check(bits.shape[1:] == (-(-vocab_size // 32),), f"mask has shape {bits.shape} for a vocabulary of {vocab_size}")
    v = np.arange(vocab_size)
    return ((bits[:, v // 32] >> (v % 32).astype(np.uint32)) & np.uint32(1)).astype(np.bool_)
