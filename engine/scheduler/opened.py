"""OpenedRows of a plan: the sampling state of rows that begin, gathered from the row table and their requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import accumulate

import numpy as np

from engine.request import Request
from engine.scheduler.table import RowTable, SamplingColumns
from engine.step import F32, I32, OpenedRows, Ragged, SamplingTable

COLUMNS = tuple(column.name for column in fields(SamplingColumns))
NOTHING = np.zeros(0, np.int32)


def opened_rows(table: RowTable, opened: Sequence[tuple[int, int]]) -> OpenedRows:
    """opened: (slot, tokens that are in the pages already)."""
    slots, computed = np.array(opened, np.int32).T.copy()
    requests = [table.entry(slot).request for slot, _ in opened]
    numbers = {name: getattr(table.sampling, name)[slots] for name in COLUMNS}
    bias_ids, bias_values = biases(requests)
    bad_words, bad_word_starts = words(requests)
    history, num_prompt = histories(requests)
    sampling = SamplingTable(
        **numbers,
        stop_ids=ragged([request.stop_ids for request in requests]),
        bias_ids=bias_ids,
        bias_values=bias_values,
        allowed_ids=allowed(requests),
        bad_words=bad_words,
        bad_word_starts=bad_word_starts,
        history=history,
        num_prompt=num_prompt,
    )
    return OpenedRows(slots=slots, generation=table.generation[slots], num_computed=computed, sampling=sampling)


def ragged(lists: Sequence[Sequence[int] | I32]) -> Ragged:
    starts = np.array([0, *accumulate(map(len, lists))], np.int32)
    if len(lists) == 1:
        return Ragged(values=np.array(lists[0], np.int32), starts=starts)
    return Ragged(values=np.concatenate([np.asarray(items, np.int32) for items in lists]), starts=starts)


def biases(requests: Sequence[Request]) -> tuple[Ragged | None, F32 | None]:
    """(ids, values) of logit_bias; None when no row has one."""
    every = [request.params.logit_bias or {} for request in requests]
    if not any(every):
        return None, None
    values = [value for bias in every for value in bias.values()]
    return ragged([list(bias) for bias in every]), np.array(values, np.float32)


def allowed(requests: Sequence[Request]) -> Ragged | None:
    every = [request.params.allowed_token_ids or [] for request in requests]
    return ragged(every) if any(every) else None


def words(requests: Sequence[Request]) -> tuple[Ragged | None, I32 | None]:
    """(token sequences of all rows, [n + 1] where each row's begin); None when no row bans any."""
    every = [word for request in requests for word in request.bad_word_ids]
    if not every:
        return None, None
    starts = np.zeros(len(requests) + 1, np.int32)
    np.cumsum([len(request.bad_word_ids) for request in requests], out=starts[1:])
    return ragged(every), starts


def histories(requests: Sequence[Request]) -> tuple[Ragged | None, I32 | None]:
    """(known tokens of rows that use them, [n] how many of them are prompt); None when no row does."""
    if not any(request.params.uses_history for request in requests):
        return None, None
    every = [request.all_tokens() if request.params.uses_history else NOTHING for request in requests]
    return ragged(every), np.array([request.num_prompt for request in requests], np.int32)
