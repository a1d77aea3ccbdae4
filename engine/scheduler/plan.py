"""From chosen rows to a StepPlan: numpy views of preallocated buffers, rows with one token first, then prompts.

The buffers come from a ring of max_in_flight + 1, so nothing is written before the step that uses it is collected.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.kv.manager import KeyedUnits
from engine.scheduler.budget import ChosenRows
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.table import RowTable
from engine.step import (
    I32,
    I64,
    LAST_TOKEN,
    PromptLogprobs,
    Sampler,
    StepPlan,
)


@dataclass(slots=True)
class ScoredPrompt:
    """Which entries of a step's prompt logprobs belong to a row."""

    slot: int
    generation: int
    count: int
    num_top: int


@dataclass(slots=True)
class InFlight:
    """What the scheduler remembers of a submitted step until it is collected."""

    plan: StepPlan
    slots: I64  # [S] plan.slots, for indexing
    held: list[tuple[int, int]]  # (pool, page) sources of copies
    keyed: list[KeyedUnits]  # known units keyed at its submission
    scored: list[ScoredPrompt] = field(default_factory=list)


class PlanBuffers:
    """Arrays of one plan, at their largest."""

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        self.slots: I32 = np.zeros(max_rows, np.int32)
        self.generation: I32 = np.zeros(max_rows, np.int32)
        self.num_computed: I32 = np.zeros(max_rows, np.int32)
        self.num_new: I32 = np.zeros(max_rows, np.int32)
        self.num_logits: I32 = np.zeros(max_rows, np.int32)
        self.logit_rows: I32 = np.zeros(max_rows, np.int32)
        self.token_ids: I32 = np.zeros(max_tokens, np.int32)
        self.positions: I32 = np.zeros((1, max_tokens), np.int32)


class PlanRing:
    def __init__(self, config: SchedulerConfig) -> None:
        self._ring = [
            PlanBuffers(config.max_num_seqs, config.max_num_batched_tokens) for _ in range(config.max_in_flight + 1)
        ]
        self._next = 0
        self.ones: I32 = np.ones(config.max_num_seqs, np.int32)
        self.arange: I32 = np.arange(max(config.max_model_len, config.max_num_batched_tokens) + 1, dtype=np.int32)

    def next(self) -> PlanBuffers:
        buffers = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        return buffers


def fill_rows(ring: PlanRing, table: RowTable, rows: ChosenRows) -> tuple[PlanBuffers, I32, I64]:
    """Write the row and token arrays. -> (buffers, logit_rows [L], sampling slots [L])."""
    buffers = ring.next()
    slots, computed, new, num_single = rows.slots, rows.computed, rows.new, rows.num_single
    count = len(slots)
    buffers.slots[:count] = slots
    buffers.generation[:count] = table.generation[slots]
    buffers.num_computed[:count] = computed
    buffers.num_new[:count] = new
    ends = rows.ends
    samples = ends == table.length[slots]
    buffers.num_logits[:count] = samples
    fill_single(buffers, table, slots[:num_single], computed[:num_single])
    if count > num_single:
        fill_chunks(buffers, table, rows, ring.arange)
    if np.count_nonzero(samples) == count:
        sampling, logit_rows = slots, buffers.logit_rows[:count]
        if count == num_single:
            logit_rows[:] = ring.arange[:count]
        else:
            np.cumsum(new, out=logit_rows)
            logit_rows -= 1  # a row's last token is the one before the next row's first
    else:
        sampling = slots[samples]
        logit_rows = buffers.logit_rows[: len(sampling)]
        logit_rows[:] = (np.cumsum(new) - 1)[samples]
    table.num_computed[slots] = ends
    table.length[sampling] += 1
    return buffers, logit_rows, sampling


def fill_single(buffers: PlanBuffers, table: RowTable, slots: I64, computed: I32) -> None:
    """Rows with one token: the one they sampled last, which the device has, or the last known one."""
    count = len(slots)
    buffers.token_ids[:count] = LAST_TOKEN
    buffers.positions[0, :count] = computed
    known = np.flatnonzero(computed < table.num_known[slots])
    if len(known):
        buffers.token_ids[known] = table.tokens[slots[known], computed[known]]


def fill_chunks(buffers: PlanBuffers, table: RowTable, rows: ChosenRows, arange: I32) -> None:
    at = rows.num_single
    span = slice(rows.num_single, None)
    triples = zip(rows.slots[span].tolist(), rows.computed[span].tolist(), rows.new[span].tolist(), strict=True)
    for slot, begin, count in triples:
        buffers.token_ids[at : at + count] = table.tokens[slot, begin : begin + count]
        buffers.positions[0, at : at + count] = arange[begin : begin + count]
        at += count


def choose_sampler(table: RowTable, sampling: I64) -> tuple[Sampler, int]:
    """(the weakest program that serves these slots, most top logprobs any of them wants)."""
    if not len(sampling):
        return Sampler.NONE, -1
    sampler = Sampler.FULL if table.needs_full[sampling].any() else Sampler.GREEDY
    return sampler, int(table.sampling.num_logprobs[sampling].max())


def score_prompts(table: RowTable, rows: ChosenRows) -> tuple[PromptLogprobs | None, list[ScoredPrompt]]:
    """Prompt logprobs of the rows that want them: token p of the step's chunk scores prompt id p + 1."""
    if not table.num_prompt_scorers:
        return None, []
    scored: list[ScoredPrompt] = []
    index: list[I32] = []
    targets: list[I32] = []
    starts = np.cumsum(rows.new) - rows.new
    for row in np.flatnonzero(table.scores_prompt[rows.slots]).tolist():
        slot, begin = int(rows.slots[row]), int(rows.computed[row])
        request = table.entry(slot).request
        # the last prompt token has no successor in the prompt
        count = min(begin + int(rows.new[row]), request.num_prompt - 1) - begin
        if count <= 0:
            continue
        wanted = request.params.prompt_logprobs or 0
        num_top = table.config.vocab_size if wanted == -1 else min(wanted, table.config.vocab_size)
        scored.append(ScoredPrompt(slot, int(table.generation[slot]), count, num_top))
        index.append(np.arange(starts[row], starts[row] + count, dtype=np.int32))
        targets.append(request.prompt[begin + 1 : begin + 1 + count])
    if not scored:
        return None, []
    wanted_top = max(row.num_top for row in scored)
    return PromptLogprobs(token_idx=np.concatenate(index), targets=np.concatenate(targets), num_top=wanted_top), scored
