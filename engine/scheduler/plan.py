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

NO_ROWS: I64 = np.zeros(0, np.int64)


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
    keyed: list[KeyedUnits]  # known units keyed since its submission
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
    """Write the row and token arrays. -> (buffers, logit_rows [L], rows of the plan that sample and are not steady)."""
    buffers = ring.next()
    slots, count, num_steady, num_single = rows.slots, len(rows.slots), rows.num_steady, rows.num_single
    buffers.slots[:count] = slots
    buffers.generation[:count] = table.generation[slots]
    buffers.num_computed[:count] = rows.computed
    buffers.num_new[:count] = rows.new
    buffers.num_logits[:num_steady] = 1
    buffers.token_ids[:num_steady] = LAST_TOKEN
    buffers.positions[0, :num_single] = rows.computed[:num_single]
    buffers.logit_rows[:num_steady] = ring.arange[:num_steady]
    table.num_computed[slots] = rows.ends
    if count == num_steady:
        table.length[slots] = rows.ends + 1
        return buffers, buffers.logit_rows[:count], NO_ROWS
    table.length[slots[:num_steady]] = rows.ends[:num_steady] + 1
    sampling = fill_single(buffers, table, rows) if num_single > num_steady else []
    if count > num_single:
        sampling += fill_chunks(buffers, table, rows, num_steady + len(sampling), ring.arange)
    return buffers, buffers.logit_rows[: num_steady + len(sampling)], np.array(sampling, np.int64)


def fill_single(buffers: PlanBuffers, table: RowTable, rows: ChosenRows) -> list[int]:
    """Rows with one token that are not steady: the one they sampled last, which the device has, or the last known one.

    -> those that sample.
    """
    begin, end = rows.num_steady, rows.num_single
    slots, computed = rows.slots[begin:end], rows.computed[begin:end]
    ids = buffers.token_ids[begin:end]
    ids.fill(LAST_TOKEN)
    known = (computed < table.num_known[slots]).nonzero()[0]
    if len(known):
        ids[known] = table.tokens[slots[known], computed[known]]
    samples = rows.ends[begin:end] == table.length[slots]
    buffers.num_logits[begin:end] = samples
    sampling = samples.nonzero()[0]
    table.length[slots[sampling]] += 1
    sampling += begin
    # each of these rows has one token, so a row's number is its token's
    buffers.logit_rows[begin : begin + len(sampling)] = sampling
    sampled: list[int] = sampling.tolist()
    return sampled


def fill_chunks(buffers: PlanBuffers, table: RowTable, rows: ChosenRows, num_logits: int, arange: I32) -> list[int]:
    """Rows with several tokens, one by one. num_logits: rows before them that sample. -> those that sample."""
    at = rows.num_single  # the rows before have one token each
    sampled: list[int] = []
    for row in range(rows.num_single, len(rows.slots)):
        slot, begin, count = rows.slots.item(row), rows.computed.item(row), rows.new.item(row)
        buffers.token_ids[at : at + count] = table.tokens[slot, begin : begin + count]
        buffers.positions[0, at : at + count] = arange[begin : begin + count]
        at += count
        length = table.length.item(slot)
        samples = begin + count == length
        buffers.num_logits[row] = samples
        if samples:
            table.length[slot] = length + 1
            buffers.logit_rows[num_logits + len(sampled)] = at - 1  # its last token
            sampled.append(row)
    return sampled


def choose_sampler(table: RowTable, sampling: I64) -> tuple[Sampler, int]:
    """(the weakest program that serves these slots, most top logprobs any of them wants)."""
    if not len(sampling):
        return Sampler.NONE, -1
    sampler = Sampler.FULL if np.count_nonzero(table.needs_full[sampling]) else Sampler.GREEDY
    return sampler, int(np.maximum.reduce(table.sampling.num_logprobs[sampling]))


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
