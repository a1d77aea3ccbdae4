"""The device tables of a torch-xla runner: as tables.py has them, all made at once and changed in padded pieces.

Each piece of a change is the arguments of one program (`Call`), made on the host at submit; backends/torch/xla.py runs
it. The row after the last slot takes what is padding. Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.torch.tables import FLOATS, IN_PROMPT, INTS, Tables
from engine.opened import Use, bad_words_of, bias_of, entry, history_of, inside, padded, row_uses
from engine.runner import SamplerLimits
from engine.step import OpenedRows, PageDelta, SamplingTable

OPENED = 8
"""Rows of one call that opens rows."""
DELTAS = 512
"""Page-table changes of one call."""
WIDE = ("bias", "allowed", "counts", "bad_prefix", "bad_last", "tail")
"""Tables whose rows are written whole, a call a row, for rows that use them."""
BEGUN = {"bias": 0.0, "allowed": True, "counts": 0, "bad_last": -1, "tail": -2}
"""What a row of them holds for rows that do not; words without a last id are none."""

Call = tuple[str, tuple[NDArray, ...]]
"""Name of a method of PaddedTables, and its tensors as arrays of the host."""


class PaddedTables(Tables):
    def __init__(
        self, max_slots: int, max_pages: Sequence[int], vocab_size: int, limits: SamplerLimits, device: torch.device
    ) -> None:
        self._sizes = (max_slots, max_pages, vocab_size, limits, device)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        super().__init__(*self._sizes)
        _, _, vocab_size, limits, _ = self._sizes
        words, width = limits.max_bad_words, limits.max_bad_word_len - 1
        self.bias = self._full(0.0, torch.float32, vocab_size)
        self.allowed = self._full(True, torch.bool, vocab_size)
        self.counts = self._full(0, torch.int32, vocab_size)
        self.bad_prefix = self._full(-1, torch.int64, words, width)
        self.bad_last = self._full(-1, torch.int64, words)
        self.tail = self._full(-2, torch.int64, width)

    def to_device(self, array: NDArray) -> Tensor:
        """A copy of `array`, on its way to the device."""
        return torch.from_numpy(np.array(array)).to(self.device)

    # on the host

    def open_calls(self, opened: OpenedRows) -> list[Call]:
        """Calls that begin the tenancies of a plan."""
        table, count, null = opened.sampling, len(opened.slots), self._slots - 1
        words = np.ascontiguousarray(table.seed.astype("<u8")).view("<u4").reshape(-1, 2)
        numbers = np.column_stack([opened.slots, *(getattr(table, name) for name in INTS), words]).astype(np.int64)
        floats = np.column_stack([getattr(table, name) for name in FLOATS]).astype(np.float32)
        width = self._limits.max_stop_ids
        stops = [padded(inside(entry(table.stop_ids, i), self._vocab), width, "stop ids") for i in range(count)]
        ints = np.concatenate([numbers, np.stack(stops).astype(np.int64)], axis=1)
        calls: list[Call] = []
        for first in range(0, count, OPENED):
            some = slice(first, first + OPENED)
            calls.append(("open_rows", (filled(ints[some], OPENED, null), filled(floats[some], OPENED, 0))))
        for i in range(count):
            calls += self._wide_calls(table, i, opened.slots[i : i + 1].astype(np.int64))
        return calls

    def _wide_calls(self, table: SamplingTable, i: int, slot: NDArray) -> list[Call]:
        """Calls for what row i has beyond numbers."""
        uses, rows = row_uses(table, i), {}
        if Use.BIAS in uses:
            ids, values = bias_of(table, i, self._vocab)
            rows["bias"] = np.zeros(self._vocab, np.float32)
            np.add.at(rows["bias"], ids, values)
        if Use.ALLOWED in uses:
            rows["allowed"] = np.zeros(self._vocab, np.bool_)
            rows["allowed"][inside(entry(table.allowed_ids, i), self._vocab)] = True
        if Use.PENALTIES in uses:
            prompt, generated = history_of(table, i, self._vocab)
            rows["counts"] = np.bincount(generated, minlength=self._vocab).astype(np.int32)
            rows["counts"][prompt] |= IN_PROMPT
        if Use.BAD_WORDS in uses:
            limits = self._limits
            parts = bad_words_of(table, i, limits.max_bad_words, limits.max_bad_word_len, self._vocab)
            rows |= dict(zip(("bad_prefix", "bad_last", "tail"), (part.astype(np.int64) for part in parts)))
        return [(f"open_{name}", (slot, row[None])) for name, row in rows.items()]

    def page_calls(self, group: int, delta: PageDelta) -> list[Call]:
        """Calls for page-table changes that are too many to ride with the step."""
        parts = np.stack([delta.slots, delta.columns, delta.pages], axis=1)
        pieces = [parts[start : start + DELTAS] for start in range(0, len(parts), DELTAS)]
        calls = [filled(piece, DELTAS, 0) for piece in pieces]
        for piece, call in zip(pieces, calls, strict=True):
            call[len(piece) :, 0] = self._slots - 1
        return [(f"pages_{group}", (call.T.astype(np.int32),)) for call in calls]

    def empty_calls(self) -> list[Call]:
        """One call of every kind, of padding alone: what warm-up compiles."""
        null = np.full(1, self._slots - 1, np.int64)
        ints = np.full((OPENED, 1 + len(INTS) + 2 + self._limits.max_stop_ids), null[0], np.int64)
        calls: list[Call] = [("open_rows", (ints, np.zeros((OPENED, len(FLOATS)), np.float32)))]
        for name in WIDE:
            table = getattr(self, name)
            row = torch.zeros((1, *table.shape[1:]), dtype=table.dtype).numpy()
            calls.append((f"open_{name}", (null, row)))
        deltas = np.zeros((3, DELTAS), np.int32)
        deltas[0] = null[0]
        return calls + [(f"pages_{group}", (deltas,)) for group in range(len(self.pages))]

    # on the device

    def run(self, call: Call) -> None:
        """Change the tables; the program is whatever stands in the graph afterwards."""
        name, arrays = call
        tensors = [self.to_device(array) for array in arrays]
        if name == "open_rows":
            self._open_rows(*tensors)
        elif name.startswith("pages_"):
            self.change_pages(int(name.removeprefix("pages_")), *tensors[0])
        else:
            getattr(self, name.removeprefix("open_")).index_copy_(0, *tensors)

    def _open_rows(self, ints: Tensor, floats: Tensor) -> None:
        """ints: i64 [OPENED, slot, INTS, seed (two words), stop ids]; floats: f32 [OPENED, FLOATS]."""
        slots, begin = ints[:, 0], 1 + len(INTS)
        for i, name in enumerate(FLOATS):
            getattr(self, name)[slots] = floats[:, i]
        for i, name in enumerate(INTS):
            getattr(self, name)[slots] = ints[:, 1 + i]
        self.seed[slots] = ints[:, begin : begin + 2]
        self.stop_ids[slots] = ints[:, begin + 2 :]
        self.last_token.index_fill_(0, slots, 0)
        for name, value in BEGUN.items():
            getattr(self, name).index_fill_(0, slots, value)

    def change_pages(self, group: int, slots: Tensor, columns: Tensor, pages: Tensor) -> None:
        """table[slots[i], columns[i]] = pages[i]; i32 [n] each."""
        self.pages[group][slots.long(), columns.long()] = pages


def filled(rows: NDArray, count: int, value: int) -> NDArray:
    """rows, [n, ...], with rows of `value` behind them: [count, ...]."""
    return np.concatenate([rows, np.full((count - len(rows), *rows.shape[1:]), value, rows.dtype)])
