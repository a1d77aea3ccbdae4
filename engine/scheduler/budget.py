"""Who gets how many tokens of a step: pure functions over arrays, rows in order.

Rows with one token to compute (decoding ones above all) come first, so that a long prompt does not hold up everybody's
next token; prompts share what is left, the first in order first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.scheduler.table import RowTable
from engine.step import I32, I64


@dataclass(slots=True)
class ChosenRows:
    """Rows of one step, those with one new token first.

    [0, num_steady)            go on from the last step (steady.py)
    [num_steady, num_single)   others with one new token
    [num_single, S)            prompts
    """

    slots: I64  # [S]
    computed: I32  # [S] before this step
    new: I32  # [S]
    num_single: int
    ends: I32  # [S] computed + new, of several turns those of the last
    num_steady: int = 0
    num_steps: int = 1  # turns; several only where all rows are steady


@dataclass(frozen=True, slots=True)
class Chosen:
    """What Scheduler.choose hands to Scheduler.plan."""

    rows: ChosenRows
    score_budget: int  # prompt log-probabilities that are left for rows that begin
    several: bool  # the step can have several turns


def tokens_to_compute(length: I32, computed: I32, max_total: I32) -> I32:
    """Tokens a row could compute now, [R]. A row that will end by length once its steps are collected gets none."""
    want = length - computed
    want *= length < max_total
    return want


def share_budget(want: I32, chunk: I32, budget: int, score_budget: int, scores: np.ndarray | None) -> I32:
    """Tokens for each row in order, [R]; zero where nothing is left.

    chunk: most tokens of a row in a step. scores: rows (bool [R]) that also draw on `score_budget`, None = nobody.
    """
    want = np.minimum(want, np.maximum(chunk, 1))
    single = want == 1
    multiple = np.where(single, 0, want)
    if scores is not None:
        scored = np.where(scores, want, 0)
        before = np.cumsum(scored) - scored
        allowed = np.clip(score_budget - before, 0, scored)
        multiple = np.where(scores, np.where(single, 0, allowed), multiple)
        single &= ~scores | (allowed > 0)
    left = budget - int(np.count_nonzero(single))
    before = np.cumsum(multiple) - multiple
    given = np.clip(left - before, 0, multiple)
    given[single] = 1
    return np.asarray(given, np.int32)


def choose_running(table: RowTable, slots: I64, budget: int) -> tuple[ChosenRows, int]:
    """Turns for the running rows `slots`, in order. -> (rows with a token or more, prompt positions left to score).

    budget: tokens, at least one a row.
    """
    config = table.config
    computed = table.num_computed[slots]
    want = tokens_to_compute(table.length[slots], computed, table.max_total[slots])
    score_budget = config.max_prompt_logprob_tokens
    if len(slots) and int(np.maximum.reduce(want)) > 1:
        scores = table.scores_prompt[slots] if table.num_prompt_scorers else None
        want = share_budget(want, table.chunk[slots], budget, score_budget, scores)
        if scores is not None:
            score_budget -= int(want[scores].sum())
    some = want > 0
    if np.count_nonzero(some) < len(some):
        slots, computed, want = slots[some], computed[some], want[some]
    return singles_first(slots, computed, want), score_budget


def singles_first(slots: I64, computed: I32, new: I32, num_steady: int = 0) -> ChosenRows:
    """Rows with one new token first, both parts in order. The first `num_steady` have one."""
    single = new == 1
    count = int(np.count_nonzero(single))
    if count == len(new):
        return ChosenRows(slots, computed, new, count, computed + new, num_steady)
    index = np.concatenate((single.nonzero()[0], (~single).nonzero()[0]))
    slots, computed, new = slots[index], computed[index], new[index]
    return ChosenRows(slots, computed, new, count, computed + new, num_steady)


def join_rows(steady: ChosenRows, others: ChosenRows) -> ChosenRows:
    """`others` behind the steady rows."""
    if not len(others.slots):
        return steady
    if not len(steady.slots):
        return others
    return ChosenRows(
        np.concatenate((steady.slots, others.slots)),
        np.concatenate((steady.computed, others.computed)),
        np.concatenate((steady.new, others.new)),
        steady.num_single + others.num_single,
        np.concatenate((steady.ends, others.ends)),
        steady.num_steady,
    )


def add_rows(rows: ChosenRows, added: list[tuple[int, int, int]]) -> ChosenRows:
    """`added`: (slot, computed, new) of rows that begin in this step."""
    before = len(rows.slots)
    count = before + len(added)
    slots, computed, new = np.empty(count, np.int64), np.empty(count, np.int32), np.empty(count, np.int32)
    slots[:before], computed[:before], new[:before] = rows.slots, rows.computed, rows.new
    for at, row in enumerate(added, before):
        slots[at], computed[at], new[at] = row
    if all(tokens > 1 for _, _, tokens in added):
        return ChosenRows(slots, computed, new, rows.num_single, computed + new, rows.num_steady)
    return singles_first(slots, computed, new, rows.num_steady)


def other_rows(rows: ChosenRows) -> ChosenRows:
    """Without the steady ones."""
    at = rows.num_steady
    return ChosenRows(rows.slots[at:], rows.computed[at:], rows.new[at:], rows.num_single - at, rows.ends[at:])


def no_rows() -> ChosenRows:
    none = np.zeros(0, np.int32)
    return ChosenRows(none.astype(np.int64), none, none, 0, none)


def drop_rows(rows: ChosenRows, gone: np.ndarray) -> ChosenRows:
    """The others; none of them is known as steady any more."""
    return singles_first(rows.slots[~gone], rows.computed[~gone], rows.new[~gone])
