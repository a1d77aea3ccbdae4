"""Who gets how many tokens of a step: pure functions over arrays, rows in order.

Rows with one token to compute (decoding ones above all) come first, so that a long prompt does not hold up everybody's
next token; prompts share what is left, the first in order first.
"""

from __future__ import annotations

import numpy as np

from engine.step import I32


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
