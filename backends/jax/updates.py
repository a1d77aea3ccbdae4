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
from backends.jax.sample import Use
from backends.jax.tables import OPEN_INTS, SCALARS, SCALARS_F32
from engine.errors import check
from engine.runner import SamplerLimits
from engine.step import I32, OpenedRows, PageCopies, PageDelta, Ragged, SamplingTable

OPENED = 8
"""Rows of one call of the open program."""
HISTORY = 1024
"""Ids of one call of the counts program."""
DELTAS = 512
"""Page-table changes of one call of the pages program."""

Call = tuple[Name, tuple[NDArray[Any], ...]]


def entry(ragged: Ragged | None, i: int) -> I32:
    if ragged is None:
        return np.zeros(0, np.int32)
    return ragged.values[ragged.starts[i] : ragged.starts[i + 1]]


def inside(ids: I32, vocab_size: int) -> I32:
    return ids[(ids >= 0) & (ids < vocab_size)]


def row_uses(table: SamplingTable, i: int) -> Use:
    """What row i of the table needs of the sampler."""
    uses = Use.NONE
    penalties = (table.presence_penalty[i], table.frequency_penalty[i], table.repetition_penalty[i])
    for wanted, use in (
        (len(entry(table.allowed_ids, i)) > 0, Use.ALLOWED),
        (table.bad_word_starts is not None and table.bad_word_starts[i + 1] > table.bad_word_starts[i], Use.BAD_WORDS),
        (table.min_tokens[i] > 0, Use.MIN_TOKENS),
        (len(entry(table.bias_ids, i)) > 0, Use.BIAS),
        (penalties != (0, 0, 1), Use.PENALTIES),
    ):
        uses |= use if wanted else Use.NONE
    if table.temperature[i] > 0:
        uses |= Use.RANDOM
        uses |= Use.MIN_P if table.min_p[i] > 0 else Use.NONE
        uses |= Use.TOP_K if table.top_k[i] > 0 else Use.NONE
        uses |= Use.TOP_P if table.top_p[i] < 1 else Use.NONE
    return uses


def is_poisoned(table: SamplingTable, i: int, vocab_size: int) -> bool:
    """Whether a table of row i holds an id outside the vocabulary; such ids are left out, and the row is flagged."""
    named = (table.stop_ids, table.bias_ids, table.allowed_ids, table.history)
    return any(len(inside(ids, vocab_size)) < len(ids) for ids in (entry(ragged, i) for ragged in named))


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
            scalars = {"top_k": table.top_k[i], "min_tokens": table.min_tokens[i], "has_allowed": has_allowed}
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
    ids = entry(table.bias_ids, i)
    if len(ids) and table.bias_ids is not None and table.bias_values is not None:
        check(len(ids) <= limits.max_logit_bias, f"{len(ids)} logit biases, the limit is {limits.max_logit_bias}")
        start = table.bias_ids.starts[i]
        bias_ids = np.full(limits.max_logit_bias, -1, np.int32)
        values = np.zeros(limits.max_logit_bias, np.float32)
        bias_ids[: len(ids)] = np.where((ids >= 0) & (ids < vocab_size), ids, -1)
        values[: len(ids)] = table.bias_values[start : start + len(ids)]
        calls.append((("open_bias",), (slot, bias_ids, values)))
    ids = inside(entry(table.allowed_ids, i), vocab_size)
    if len(entry(table.allowed_ids, i)):
        bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        bits[ids] = 1
        calls.append((("open_allowed",), (slot, np.packbits(bits, bitorder="little").view("<u4"))))
    if table.bad_words is not None and table.bad_word_starts is not None:
        first, last = table.bad_word_starts[i : i + 2].tolist()
        if last > first:
            calls.append((("open_bad_words",), (slot, *bad_words(table, i, first, last, limits, vocab_size))))
    history = entry(table.history, i)
    num_prompt = 0 if table.num_prompt is None else int(table.num_prompt[i])
    for start in range(0, len(history), HISTORY):
        piece = history[start : start + HISTORY]
        ids = np.full(HISTORY, vocab_size, np.int32)
        ids[: len(piece)] = np.where((piece >= 0) & (piece < vocab_size), piece, vocab_size)
        prompt = np.array([min(max(num_prompt - start, 0), len(piece))], np.int32)
        calls.append((("open_counts",), (slot, np.array([start == 0], np.int32), ids, prompt)))
    return calls


def bad_words(
    table: SamplingTable, i: int, first: int, last: int, limits: SamplerLimits, vocab_size: int
) -> tuple[I32, I32, I32]:
    """(prefixes, last ids, ids generated last) of row i, whose words are sequences [first, last) of the table."""
    width = limits.max_bad_word_len - 1
    check(last - first <= limits.max_bad_words, f"{last - first} bad words, the limit is {limits.max_bad_words}")
    prefix = np.full((limits.max_bad_words, width), -1, np.int32)
    ends = np.full(limits.max_bad_words, -1, np.int32)
    for nth, word in enumerate(entry(table.bad_words, j) for j in range(first, last)):
        check(len(word) <= width + 1, f"a bad word of {len(word)} ids, the limit is {width + 1}")
        if len(inside(word, vocab_size)) == len(word) > 0:
            ends[nth] = word[-1]
            prefix[nth, width - (len(word) - 1) :] = word[:-1]
    tail = np.full(width, -2, np.int32)
    generated = entry(table.history, i)[0 if table.num_prompt is None else int(table.num_prompt[i]) :][-width:]
    tail[width - len(generated) :] = generated
    return prefix, ends, tail


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
