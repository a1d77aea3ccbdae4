"""What an opened row asks of a device sampler, as pure numpy: which processors, which ids are poison, padded tables.

Both backends fill their device tables from these, so that the two agree on what is clamped, padded and left out.
Called by backends/*; needs numpy alone.
"""

from __future__ import annotations

from enum import IntFlag

import numpy as np
import numpy.typing as npt

from engine.errors import check
from engine.step import I32, Ragged, SamplingTable


class Use(IntFlag):
    """What a row needs of the sampler; a step needs what any of its rows needs."""

    NONE = 0
    ALLOWED = 1
    BAD_WORDS = 2
    MIN_TOKENS = 4
    BIAS = 8
    PENALTIES = 16
    RANDOM = 32
    MIN_P = 64
    TOP_K = 128
    TOP_P = 256
    MASK = 512
    LOGPROBS = 1024


def entry(ragged: Ragged | None, i: int) -> I32:
    """List i of a Ragged, empty where there is none."""
    if ragged is None:
        return np.zeros(0, np.int32)
    return ragged.values[ragged.starts[i] : ragged.starts[i + 1]]


def inside(ids: I32, vocab_size: int) -> I32:
    """The ids in [0, V)."""
    return ids[(ids >= 0) & (ids < vocab_size)]


def has_bad_words(table: SamplingTable, i: int) -> bool:
    starts = table.bad_word_starts
    return starts is not None and bool(starts[i + 1] > starts[i])


def row_uses(table: SamplingTable, i: int) -> Use:
    """What row i of the table needs of the sampler."""
    uses = Use.NONE
    penalties = (table.presence_penalty[i], table.frequency_penalty[i], table.repetition_penalty[i])
    for wanted, use in (
        (len(entry(table.allowed_ids, i)) > 0, Use.ALLOWED),
        (has_bad_words(table, i), Use.BAD_WORDS),
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


def padded(ids: I32, width: int, what: str, fill: int = -1) -> I32:
    """ids, filled up to `width`. More than `width` of them is our own bug: the bounds table keeps requests inside."""
    check(len(ids) <= width, f"{len(ids)} {what}, the limit is {width}")
    row = np.full(width, fill, np.int32)
    row[: len(ids)] = ids
    return row


def bias_of(table: SamplingTable, i: int, vocab_size: int) -> tuple[I32, npt.NDArray[np.float32]]:
    """(ids, values) of row i's logit bias, ids outside the vocabulary left out."""
    if table.bias_ids is None or table.bias_values is None:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    ids = entry(table.bias_ids, i)
    start = table.bias_ids.starts[i]
    good = (ids >= 0) & (ids < vocab_size)
    return ids[good], table.bias_values[start : start + len(ids)][good]


def history_of(table: SamplingTable, i: int, vocab_size: int) -> tuple[I32, I32]:
    """(prompt ids, generated ids) of row i's history, ids outside the vocabulary left out."""
    ids = entry(table.history, i)
    num_prompt = 0 if table.num_prompt is None else int(table.num_prompt[i])
    return inside(ids[:num_prompt], vocab_size), inside(ids[num_prompt:], vocab_size)


def bad_words_of(table: SamplingTable, i: int, max_words: int, max_len: int, vocab_size: int) -> tuple[I32, I32, I32]:
    """Row i's bad words for the device.

    -> (prefixes [max_words, max_len - 1], right aligned, -1 pads; last ids [max_words], -1 pads;
        ids generated last [max_len - 1], right aligned, -2 pads)
    """
    width = max_len - 1
    prefix = np.full((max_words, width), -1, np.int32)
    ends = np.full(max_words, -1, np.int32)
    if table.bad_words is not None and table.bad_word_starts is not None:
        first, last = table.bad_word_starts[i : i + 2].tolist()
        check(last - first <= max_words, f"{last - first} bad words, the limit is {max_words}")
        for nth, word in enumerate(entry(table.bad_words, j) for j in range(first, last)):
            check(len(word) <= max_len, f"a bad word of {len(word)} ids, the limit is {max_len}")
            if len(inside(word, vocab_size)) == len(word) > 0:
                ends[nth] = word[-1]
                prefix[nth, width - (len(word) - 1) :] = word[:-1]
    tail = np.full(width, -2, np.int32)
    num_prompt = 0 if table.num_prompt is None else int(table.num_prompt[i])
    generated = entry(table.history, i)[num_prompt:][-width:]
    tail[width - len(generated) :] = generated
    return prefix, ends, tail
