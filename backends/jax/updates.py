"""Changes of the device tables that a plan asks for, as calls of update programs with packed arguments.

Runs on the host at submit; every array made here is new, nothing of the plan is aliased. What only some rows have
(bias, allowed ids, bad words, histories) costs a call only when a row has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.jax.cache import COPIES
from backends.jax.compile import Name
from backends.jax.tables import OPEN_INTS, SCALARS, SCALARS_F32
from engine.errors import check
from engine.opened import bad_words_of, bias_of, entry, has_bad_words, inside, padded
from engine.runner import SamplerLimits
from engine.step import OpenedRows, PageCopies, PageDelta

OPENED = 8
"""Rows of one call of the open program."""
HISTORY = 1024
"""Ids of one call of the counts program."""
DELTAS = 512
"""Page-table changes of one call of the pages program."""

Call = tuple[Name, tuple[NDArray[Any], ...]]


def open_calls(opened: OpenedRows, limits: SamplerLimits, vocab_size: int, null_slot: int) -> list[Call]:
    """Calls that begin the tenancies of a plan."""
    calls: list[Call] = []
    table, count = opened.sampling, len(opened.slots)
    for first in range(0, count, OPENED):
        ints = np.full((OPENED, OPEN_INTS + limits.max_stop_ids), -1, np.int32)
        floats = np.zeros((OPENED, len(SCALARS_F32)), np.float32)
        ints[:, 0] = null_slot
        for row, i in enumerate(range(first, min(first + OPENED, count))):
            ints[row, :3] = opened.slots[i], opened.num_computed[i], table.num_outputs[i]
            has_allowed = len(entry(table.allowed_ids, i)) > 0
            scalars = {name: getattr(table, name)[i] for name in SCALARS if name != "has_allowed"}
            scalars["has_allowed"] = has_allowed
            ints[row, 3 : 3 + len(SCALARS)] = [scalars[name] for name in SCALARS]
            ints[row, OPEN_INTS - 2 : OPEN_INTS] = table.seed[i : i + 1].astype("<u8").view(np.int32)
            stops = inside(entry(table.stop_ids, i), vocab_size)
            check(len(stops) <= limits.max_stop_ids, f"{len(stops)} stop ids, the limit is {limits.max_stop_ids}")
            ints[row, OPEN_INTS : OPEN_INTS + len(stops)] = stops
        for column, name in enumerate(SCALARS_F32):
            source = name if hasattr(table, name) else f"{name}_penalty"
            values = getattr(table, source)[first : first + OPENED]
            floats[: len(values), column] = values
        calls.append((("open",), (ints, floats)))
    for i in range(count):
        calls += extra_calls(opened, i, limits, vocab_size)
    return calls


def extra_calls(opened: OpenedRows, i: int, limits: SamplerLimits, vocab_size: int) -> list[Call]:
    """Calls for what row i has beyond numbers."""
    calls: list[Call] = []
    table, slot = opened.sampling, opened.slots[i : i + 1].copy()
    ids, biases = bias_of(table, i, vocab_size)
    if len(ids):
        values = np.zeros(limits.max_logit_bias, np.float32)
        values[: len(ids)] = biases
        calls.append((("open_bias",), (slot, padded(ids, limits.max_logit_bias, "logit biases"), values)))
    ids = inside(entry(table.allowed_ids, i), vocab_size)
    if len(entry(table.allowed_ids, i)):
        bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        bits[ids] = 1
        calls.append((("open_allowed",), (slot, np.packbits(bits, bitorder="little").view("<u4"))))
    if has_bad_words(table, i):
        words = bad_words_of(table, i, limits.max_bad_words, limits.max_bad_word_len, vocab_size)
        calls.append((("open_bad_words",), (slot, *words)))
    history = entry(table.history, i)
    num_prompt = 0 if table.num_prompt is None else int(table.num_prompt[i])
    for start in range(0, len(history), HISTORY):
        piece = history[start : start + HISTORY]
        ids = np.full(HISTORY, vocab_size, np.int32)
        ids[: len(piece)] = np.where((piece >= 0) & (piece < vocab_size), piece, vocab_size)
        prompt = np.array([min(max(num_prompt - start, 0), len(piece))], np.int32)
        calls.append((("open_counts",), (slot, np.array([start == 0], np.int32), ids, prompt)))
    return calls


def page_calls(group: int, delta: PageDelta, null_slot: int) -> list[Call]:
    """Calls for page-table changes that are too many to ride with the step."""
    calls: list[Call] = []
    for start in range(0, len(delta.slots), DELTAS):
        parts = np.zeros((3, DELTAS), np.int32)
        parts[0] = null_slot
        for row, values in enumerate((delta.slots, delta.columns, delta.pages)):
            piece = values[start : start + DELTAS]
            parts[row, : len(piece)] = piece
        calls.append((("pages", group), (parts,)))
    return calls


def copy_calls(copies: PageCopies) -> list[Call]:
    """Calls for page copies, in the plan's order within each pool."""
    calls: list[Call] = []
    for pool in np.unique(copies.pool).tolist():
        of_pool = np.flatnonzero(copies.pool == pool)
        for start in range(0, len(of_pool), COPIES):
            chosen = of_pool[start : start + COPIES]
            parts = np.zeros((3, COPIES), np.int32)  # padding copies no token of the null page onto itself
            for row, values in enumerate((copies.source, copies.target, copies.tokens)):
                parts[row, : len(chosen)] = values[chosen]
            calls.append((("copy", pool), (parts,)))
    return calls
