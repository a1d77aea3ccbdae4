"""Philox and the sampler of the fake runner, in plain numpy: per-slot sampling tables and samples from them.

The order of operations is the one of docs/contract.md (section Sampling), the same that backends/jax/sample.py and
backends/torch/sample.py follow on their devices. `tests/reference/sampler.py` is an independent reading of the same
text and is compared with this file; the two share no code.

Always true: what a slot's former tenant left (counts, masks, histories) is dropped when the slot is opened.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.errors import check
from engine.step import F32, I32, U64, OpenedRows, Ragged, SamplingTable

Bool = npt.NDArray[np.bool_]

PHILOX_M0, PHILOX_M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
LOW32 = np.uint64(0xFFFFFFFF)
SAMPLING_STREAM = 0


def philox(counter: U64, key: U64) -> U64:
    """Philox-4x32-10 (Salmon et al., SC 2011): counter u64 [..., 4], key u64 [..., 2] of 32-bit words -> [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key[..., 0], key[..., 1]
    for turn in range(10):
        if turn:
            k0, k1 = (k0 + np.uint64(PHILOX_W0)) & LOW32, (k1 + np.uint64(PHILOX_W1)) & LOW32
        product0, product1 = PHILOX_M0 * c0, PHILOX_M1 * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ k0,
            product1 & LOW32,
            (product0 >> np.uint64(32)) ^ c3 ^ k1,
            product0 & LOW32,
        )
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1)


def gumbel(seed: U64, output_idx: I32, vocab_size: int) -> F32:
    """f32 [n, V] standard Gumbel noise of row i's output number output_idx[i]. seed: u64 [n]."""
    blocks = -(-vocab_size // 4)
    counter = np.zeros((len(seed), blocks, 4), np.uint64)
    counter[:, :, 0] = output_idx.astype(np.uint64)[:, None]
    counter[:, :, 1] = np.arange(blocks, dtype=np.uint64)
    counter[:, :, 2] = SAMPLING_STREAM
    key = np.stack([seed & LOW32, seed >> np.uint64(32)], axis=-1)[:, None, :]
    bits = philox(counter, key).reshape(len(seed), -1)[:, :vocab_size]
    # 23 bits: with 24 the largest draw would round to u == 1 and its noise to infinity
    uniform = ((bits >> np.uint64(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    noise: F32 = -np.log(-np.log(uniform))
    return noise


@dataclass(slots=True)
class Extras:
    """What only some tenants have. Masks and counts are as wide as the vocabulary."""

    allowed: Bool | None = None  # [V]
    bias: F32 | None = None  # [V]
    bad_words: list[tuple[int, ...]] = field(default_factory=list)
    prompt: Bool | None = None  # [V] ids that stand in the prompt
    counts: I32 | None = None  # [V] how often an id was generated
    generated: list[int] = field(default_factory=list)


class SamplerTables:
    """Sampling state of every slot, struct of arrays; what is ragged hangs in `extras`."""

    def __init__(self, max_slots: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        n = max_slots
        self.temperature = np.zeros(n, np.float32)
        self.top_p = np.ones(n, np.float32)
        self.min_p = np.zeros(n, np.float32)
        self.top_k = np.zeros(n, np.int32)
        self.presence = np.zeros(n, np.float32)
        self.frequency = np.zeros(n, np.float32)
        self.repetition = np.ones(n, np.float32)
        self.seed = np.zeros(n, np.uint64)
        self.num_outputs = np.zeros(n, np.int32)
        self.min_tokens = np.zeros(n, np.int32)
        self.max_outputs = np.zeros(n, np.int32)
        self.greedy = np.ones(n, np.bool_)  # argmax of the raw logits is the answer
        self.poisoned = np.zeros(n, np.bool_)  # a table of this tenant holds an id outside [0, V)
        self.stop_ids: list[I32] = [np.zeros(0, np.int32)] * n
        self.extras: dict[int, Extras] = {}

    def open(self, opened: OpenedRows) -> None:
        """Fill the slots from the plan, forgetting the former tenants."""
        table, slots = opened.sampling, opened.slots
        for name, values in (
            ("temperature", table.temperature),
            ("top_p", table.top_p),
            ("min_p", table.min_p),
            ("top_k", table.top_k),
            ("presence", table.presence_penalty),
            ("frequency", table.frequency_penalty),
            ("repetition", table.repetition_penalty),
            ("seed", table.seed),
            ("num_outputs", table.num_outputs),
            ("min_tokens", table.min_tokens),
            ("max_outputs", table.max_outputs),
        ):
            check(len(values) == len(slots), f"SamplingTable.{name} has {len(values)} entries for {len(slots)} rows")
            getattr(self, name)[slots] = values
        for i, slot in enumerate(slots.tolist()):
            self.extras.pop(slot, None)
            stop_ids = entry(table.stop_ids, i)
            self.stop_ids[slot] = self.valid(stop_ids)
            extras = self.read_extras(table, i)
            penalised = bool(self.presence[slot] or self.frequency[slot] or self.repetition[slot] != 1)
            counted = extras is not None and extras.counts is not None
            check(counted or not penalised, f"slot {slot}: penalties, no history")
            if extras is not None:
                self.extras[slot] = extras
            self.greedy[slot] = self.temperature[slot] == 0 and extras is None and table.min_tokens[i] == 0
            others = (table.bias_ids, table.allowed_ids, table.history)
            ids = [stop_ids] + [optional_entry(ragged, i) for ragged in others]
            self.poisoned[slot] = any(len(self.valid(x)) < len(x) for x in ids)

    def valid(self, ids: I32) -> I32:
        return ids[(ids >= 0) & (ids < self.vocab_size)]

    def read_extras(self, table: SamplingTable, i: int) -> Extras | None:
        """Masks, biases and histories of the plan's i-th opened row, None when it has none."""
        extras = Extras()
        if len(ids := optional_entry(table.allowed_ids, i)):
            extras.allowed = np.zeros(self.vocab_size, np.bool_)
            extras.allowed[self.valid(ids)] = True
        if table.bias_ids is not None and table.bias_values is not None and len(ids := entry(table.bias_ids, i)):
            start = table.bias_ids.starts[i]
            extras.bias = np.zeros(self.vocab_size, np.float32)
            inside = (ids >= 0) & (ids < self.vocab_size)
            np.add.at(extras.bias, ids[inside], table.bias_values[start : start + len(ids)][inside])
        if table.bad_words is not None and table.bad_word_starts is not None:
            first, last = table.bad_word_starts[i : i + 2]
            extras.bad_words = [tuple(entry(table.bad_words, j).tolist()) for j in range(first, last)]
        if table.num_prompt is not None and len(ids := optional_entry(table.history, i)):
            self.read_history(extras, ids, int(table.num_prompt[i]), int(table.num_outputs[i]))
        longest = max((len(word) for word in extras.bad_words), default=0)
        check(longest < 2 or extras.counts is not None, "bad words of two tokens and more need a history")
        used = (extras.allowed, extras.bias, extras.counts, extras.bad_words or None)
        return extras if any(part is not None for part in used) else None

    def read_history(self, extras: Extras, ids: I32, num_prompt: int, num_outputs: int) -> None:
        """ids: prompt and generated ids so far."""
        generated = len(ids) - num_prompt
        check(generated == num_outputs, f"history holds {generated} generated ids, num_outputs is {num_outputs}")
        extras.prompt = np.zeros(self.vocab_size, np.bool_)
        extras.prompt[self.valid(ids[:num_prompt])] = True
        extras.counts = np.bincount(self.valid(ids[num_prompt:]), minlength=self.vocab_size).astype(np.int32)
        extras.generated = ids[num_prompt:].tolist()

    def append(self, slots: I32, tokens: I32) -> None:
        """Account one generated token a slot."""
        self.num_outputs[slots] += 1
        if self.extras:
            for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
                if (extras := self.extras.get(slot)) is not None and extras.counts is not None:
                    extras.counts[token] += 1
                    extras.generated.append(token)

    def stopped(self, slots: I32, tokens: I32) -> Bool:
        """bool [n]: the token just appended ends the row (device-side, for num_steps > 1)."""
        outputs = self.num_outputs[slots]
        done = outputs >= self.max_outputs[slots]
        for i, (slot, token) in enumerate(zip(slots.tolist(), tokens.tolist(), strict=True)):
            done[i] |= bool((self.stop_ids[slot] == token).any()) and outputs[i] >= self.min_tokens[slot]
        return done

    def sample(self, logits: F32, slots: I32, mask: Bool | None) -> I32:
        """Token ids [n] of one logit row a slot. logits: f32 [n, V], overwritten; mask: bool [n, V] of a late mask."""
        if mask is not None:
            logits[~mask] = -np.inf
        for i, slot in enumerate(slots.tolist()):
            if not self.greedy[slot]:
                self.process(logits[i], slot)
        temperature = self.temperature[slots]
        tokens: I32 = logits.argmax(axis=-1).astype(np.int32)
        drawn = np.flatnonzero(temperature > 0)
        if len(drawn):
            rows, chosen = logits[drawn] / temperature[drawn, None], slots[drawn]
            keep_likely(rows, self.min_p[chosen])
            keep_top_k(rows, self.top_k[chosen])
            keep_top_p(rows, self.top_p[chosen])
            rows += gumbel(self.seed[chosen], self.num_outputs[chosen], self.vocab_size)
            tokens[drawn] = rows.argmax(axis=-1)
        return tokens

    def process(self, row: F32, slot: int) -> None:
        """allowed ids, bad words, minimum length, bias, penalties; row: f32 [V], changed in place."""
        extras = self.extras.get(slot)
        if extras is not None and extras.allowed is not None:
            row[~extras.allowed] = -np.inf
        if extras is not None:
            for *prefix, last in extras.bad_words:
                if 0 <= last < self.vocab_size and (not prefix or extras.generated[-len(prefix) :] == prefix):
                    row[last] = -np.inf
        if self.num_outputs[slot] < self.min_tokens[slot]:
            row[self.stop_ids[slot]] = -np.inf
        if extras is not None and extras.bias is not None:
            row += extras.bias
        if extras is not None and extras.counts is not None and extras.prompt is not None:
            repetition, generated = self.repetition[slot], extras.counts > 0
            if repetition != 1:
                seen = generated | extras.prompt
                row[seen] = np.where(row[seen] > 0, row[seen] / repetition, row[seen] * repetition)
            row -= self.frequency[slot] * extras.counts.astype(np.float32)
            row -= self.presence[slot] * generated.astype(np.float32)


def entry(ragged: Ragged, i: int) -> I32:
    return ragged.values[ragged.starts[i] : ragged.starts[i + 1]]


def optional_entry(ragged: Ragged | None, i: int) -> I32:
    return np.zeros(0, np.int32) if ragged is None else entry(ragged, i)


def keep_likely(rows: F32, min_p: F32) -> None:
    """Drop ids whose probability is under min_p times the largest."""
    used = min_p > 0
    if used.any():
        with np.errstate(divide="ignore"):
            floor = rows.max(axis=-1) + np.log(min_p)
        rows[(rows < floor[:, None]) & used[:, None]] = -np.inf


def keep_top_k(rows: F32, top_k: I32) -> None:
    """Keep the top_k largest of each row, ties at the threshold included; 0 keeps all."""
    for i in np.flatnonzero((top_k > 0) & (top_k < rows.shape[1])):
        k = int(top_k[i])
        threshold = np.partition(rows[i], -k)[-k]
        rows[i][rows[i] < threshold] = -np.inf


def keep_top_p(rows: F32, top_p: F32) -> None:
    """Keep the smallest set of likeliest ids whose probability reaches top_p, ties included; 1 keeps all."""
    for i in np.flatnonzero(top_p < 1):
        row = rows[i]
        if row.max() == -np.inf:
            continue  # nothing is allowed: the first id is as good as any
        probs = np.exp(row - row.max())
        order = np.sort(row)[::-1]
        total = np.cumsum(np.sort(probs)[::-1], dtype=np.float64)
        # the first place where the sum reaches p; the value there is the threshold
        last = int(np.searchsorted(total, float(top_p[i]) * total[-1], side="left"))
        row[row < order[min(last, len(order) - 1)]] = -np.inf


def log_softmax(logits: F32) -> F32:
    """f32 [n, V]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: F32 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
