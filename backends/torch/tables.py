"""Persistent device tables: one row a slot, changed only by deltas that plans bring.

Written when a row is opened (its former tenant's row is overwritten), read and advanced by every step. What only some
tenants have (bias, allowed ids, bad words, counts) is allocated when the first of them comes. Owned by the runner.
Letters: V vocabulary · n entries of one update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.opened import Use, bad_words_of, bias_of, entry, history_of, inside, padded, row_uses
from engine.runner import SamplerLimits
from engine.step import OpenedRows, PageDelta, SamplingTable

IN_PROMPT = 1 << 30
"""Bit of `counts` that says an id stands in the prompt; the bits below count generated ids."""

FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTS = ("top_k", "min_tokens", "num_outputs")


class Tables:
    """All tensors [max_slots + 1, ...] on the device."""

    def __init__(
        self, max_slots: int, max_pages: Sequence[int], vocab_size: int, limits: SamplerLimits, device: torch.device
    ) -> None:
        self.device = device
        self._slots = max_slots + 1  # the last one takes the padded rows of a GPU step
        self._vocab = vocab_size
        self._limits = limits
        self.pages = [self._full(0, torch.int32, count) for count in max_pages]
        self.last_token = self._full(0, torch.int64)
        for name in FLOATS:
            setattr(self, name, self._full(0, torch.float32))
        for name in INTS:
            setattr(self, name, self._full(0, torch.int64))
        self.seed = self._full(0, torch.int64, 2)  # low word, high word
        self.stop_ids = self._full(-1, torch.int64, limits.max_stop_ids)
        # absent until somebody needs them
        self.bias: Tensor | None = None  # f32 [.., V]
        self.allowed: Tensor | None = None  # bool [.., V]
        self.counts: Tensor | None = None  # i32 [.., V]
        self.bad_prefix: Tensor | None = None  # i64 [.., words, len - 1]
        self.bad_last: Tensor | None = None  # i64 [.., words]
        self.tail: Tensor | None = None  # i64 [.., len - 1]

    def _full(self, value: float, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.full((self._slots, *shape), value, dtype=dtype, device=self.device)

    def to_device(self, array: np.ndarray) -> Tensor:
        """A copy of `array`, on its way to the device."""
        host = torch.from_numpy(np.array(array))
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def set_pages(self, group: int, delta: PageDelta) -> None:
        packed = self.to_device(np.stack([delta.slots, delta.columns, delta.pages]).astype(np.int64))
        self.pages[group][packed[0], packed[1]] = packed[2].int()

    def open(self, opened: OpenedRows) -> None:
        """Begin tenancies."""
        table = opened.sampling
        slots = self.to_device(opened.slots.astype(np.int64))
        floats = self.to_device(np.stack([getattr(table, name) for name in FLOATS]).astype(np.float32))
        ints = self.to_device(np.stack([getattr(table, name) for name in INTS]).astype(np.int64))
        for row, name in zip(floats, FLOATS, strict=True):
            getattr(self, name)[slots] = row
        for row, name in zip(ints, INTS, strict=True):
            getattr(self, name)[slots] = row
        words = np.ascontiguousarray(table.seed.astype("<u8")).view("<u4").reshape(-1, 2)
        self.seed[slots] = self.to_device(words.astype(np.int64))
        self.last_token[slots] = 0
        width = self._limits.max_stop_ids
        stops = [padded(inside(entry(table.stop_ids, i), self._vocab), width, "stop ids") for i in range(len(slots))]
        self.stop_ids[slots] = self.to_device(np.stack(stops).astype(np.int64))
        for i, slot in enumerate(opened.slots.tolist()):
            self._open_extras(opened, i, slot, row_uses(table, i))

    def _open_extras(self, opened: OpenedRows, i: int, slot: int, uses: Use) -> None:
        """What a row has beyond numbers. A table that exists is cleared for a row that does not use it."""
        table = opened.sampling
        if self.bias is not None:
            self.bias[slot] = 0
        if Use.BIAS in uses:
            if self.bias is None:
                self.bias = self._full(0, torch.float32, self._vocab)
            ids, values = bias_of(table, i, self._vocab)
            self.bias[slot].index_add_(0, self.to_device(ids.astype(np.int64)), self.to_device(values))
        if self.allowed is not None:
            self.allowed[slot] = True
        if Use.ALLOWED in uses:
            if self.allowed is None:
                self.allowed = self._full(True, torch.bool, self._vocab)
            self.allowed[slot] = False
            self.allowed[slot, self.to_device(inside(entry(table.allowed_ids, i), self._vocab).astype(np.int64))] = True
        self._open_bad_words(table, i, slot, Use.BAD_WORDS in uses)
        if self.counts is not None:
            self.counts[slot] = 0
        if Use.PENALTIES in uses:
            if self.counts is None:
                self.counts = self._full(0, torch.int32, self._vocab)
            prompt, generated = history_of(table, i, self._vocab)
            row = np.bincount(generated, minlength=self._vocab).astype(np.int32)
            row[prompt] |= IN_PROMPT
            self.counts[slot] = self.to_device(row)

    def _open_bad_words(self, table: SamplingTable, i: int, slot: int, used: bool) -> None:
        limits = self._limits
        if self.bad_last is not None and self.tail is not None:
            self.bad_last[slot], self.tail[slot] = -1, -2
        if used:
            if self.bad_last is None or self.bad_prefix is None or self.tail is None:
                width = limits.max_bad_word_len - 1
                self.bad_prefix = self._full(-1, torch.int64, limits.max_bad_words, width)
                self.bad_last = self._full(-1, torch.int64, limits.max_bad_words)
                self.tail = self._full(-2, torch.int64, width)
            parts = bad_words_of(table, i, limits.max_bad_words, limits.max_bad_word_len, self._vocab)
            prefix, last, tail = (self.to_device(part.astype(np.int64)) for part in parts)
            self.bad_prefix[slot], self.bad_last[slot], self.tail[slot] = prefix, last, tail

    def advance(self, slots: Tensor, tokens: Tensor) -> None:
        """What every sampled token changes. slots, tokens: i64 [n]."""
        self.last_token[slots] = tokens
        self.num_outputs[slots] += 1
        if self.tail is not None:
            self.tail[slots] = torch.cat([self.tail[slots][:, 1:], tokens[:, None]], dim=1)
        if self.counts is not None:
            self.counts[slots, tokens] += 1
