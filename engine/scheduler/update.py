"""From a StepResult to what the clients get: tokens appended, ends detected, errors told apart, all over arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.request import FinishReason
from engine.scheduler.plan import InFlight, ScoredPrompt
from engine.scheduler.table import RowTable
from engine.step import I32, I64, U8, Logprobs, RowError, StepPlan, StepResult


@dataclass(slots=True)
class StepColumns:
    """One entry for each row that made a token. core/loop.py turns this into the StepOutputs message."""

    keys: I64  # [R]
    counts: I32  # [R]
    tokens: I32  # [sum of counts]
    finish: U8  # [R] FinishReason
    stop_token: I32  # [R] the id that ended it, -1 = none
    num_cached: I32  # [R]
    logprobs: Logprobs | None = None  # n = sum of counts
    prompt_logprobs: dict[int, Logprobs] = field(default_factory=dict)  # request key -> its whole prompt


@dataclass(frozen=True, slots=True)
class Failure:
    """One request ended in an error."""

    key: int
    code: str
    message: str


@dataclass(slots=True)
class Applied:
    """columns: None when no row made a token. finished, failed: slots whose tenancy ends now."""

    columns: StepColumns | None
    finished: list[int]
    failed: list[tuple[int, Failure]]


LENGTH = np.uint8(FinishReason.LENGTH)
ROW_ERRORS = {
    RowError.BAD_TOKEN_ID: "a token id outside of the vocabulary reached the device",
    RowError.NON_FINITE: "the model's logits are not finite for this request",
    RowError.TRANSFER_FAILED: "the cached tokens of this request could not be loaded",
}


def empty_columns() -> StepColumns:
    """A step that gave prompt logprobs alone."""
    none = np.zeros(0, np.int32)
    return StepColumns(np.zeros(0, np.int64), none, none, np.zeros(0, np.uint8), none, none)


def apply_result(table: RowTable, flight: InFlight, result: StepResult) -> Applied:
    """Write a result into the table. Rows whose tenancy ended since the plan are passed by (S-10)."""
    if flight.plan.num_steps > 1:
        return apply_turns(table, flight, result)
    plan, index = flight.plan, flight.slots
    count = plan.num_rows
    live = table.generation[index] == plan.generation
    all_live = np.count_nonzero(live) == count
    ends = plan.num_computed + plan.num_new
    if all_live:
        table.collected[index] = ends
    else:
        table.collected[index[live]] = ends[live]
    failed: list[tuple[int, Failure]] = []
    rows: I64 | None = None
    tokens = np.ascontiguousarray(result.tokens[:, 0])
    if all_live and len(plan.logit_rows) == count and sound(table, result, tokens):
        slots = index
    else:
        wrong = broken_rows(table, plan, result) & live
        failed = [describe_failure(table, plan, result, row) for row in np.flatnonzero(wrong).tolist()]
        rows = np.flatnonzero(live & (plan.num_logits > 0) & ~wrong)
        slots, tokens = index[rows], tokens[rows]
    if not len(slots):
        return Applied(None, [], failed)
    columns = append_tokens(table, slots, tokens)
    if result.logprobs is not None:
        columns.logprobs = select_logprobs(result.logprobs, rows, result.tokens.shape[1])
    finished = slots[columns.finish.nonzero()[0]].tolist() if np.count_nonzero(columns.finish) else []
    return Applied(columns, finished, failed)


def apply_turns(table: RowTable, flight: InFlight, result: StepResult) -> Applied:
    """`apply_result` of a step of several turns, in which every row samples; turn after turn, as if they were steps."""
    plan, index = flight.plan, flight.slots
    live = table.generation[index] == plan.generation
    wrong = broken_turns(table, plan, result) & live
    failed = [describe_failure(table, plan, result, row) for row in np.flatnonzero(wrong).tolist()]
    rows = np.flatnonzero(live & ~wrong)
    if not len(rows):
        return Applied(None, [], failed)
    slots, tokens = index[rows], result.tokens[rows]
    taken, finish = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.uint8)
    stop_token = np.full(len(rows), -1, np.int32)
    for turn in range(plan.num_steps):
        going = ((finish == FinishReason.NONE) & (result.num_sampled[rows] > turn)).nonzero()[0]
        columns = append_tokens(table, slots[going], np.ascontiguousarray(tokens[going, turn]))
        taken[going] += 1
        finish[going], stop_token[going] = columns.finish, columns.stop_token
    table.collected[slots] = plan.num_computed[rows] + taken
    # the next steps were planned as if a row took all turns unless it ends: one that stopped for nothing is at fault
    short = np.flatnonzero((finish == FinishReason.NONE) & (taken < plan.num_steps))
    failed += [describe_failure(table, plan, result, int(rows[i])) for i in short.tolist()]
    kept = np.ones(len(rows), np.bool_)
    kept[short] = False
    if len(short):
        rows, slots, tokens, taken = rows[kept], slots[kept], tokens[kept], taken[kept]
        finish, stop_token = finish[kept], stop_token[kept]
    given = np.arange(plan.num_steps) < taken[:, None]  # [R, turns]
    columns = StepColumns(
        keys=table.key[slots],
        counts=taken,
        tokens=tokens[given],
        finish=finish,
        stop_token=stop_token,
        num_cached=table.num_cached[slots],
    )
    if result.logprobs is not None:
        columns.logprobs = pick(result.logprobs, (rows[:, None] * plan.num_steps + np.arange(plan.num_steps))[given])
    return Applied(columns, slots[finish.nonzero()[0]].tolist(), failed)


def broken_turns(table: RowTable, plan: StepPlan, result: StepResult) -> np.ndarray:
    """`broken_rows` of a step of several turns: bool [S]."""
    count = result.num_sampled
    sampled = np.arange(plan.num_steps) < count[:, None]
    outside = (sampled & (result.tokens.astype(np.uint32) >= table.config.vocab_size)).any(axis=1)
    wrong: np.ndarray = (result.error != 0) | outside | (count < 1) | (count > plan.num_steps)
    return wrong


def sound(table: RowTable, result: StepResult, tokens: I32) -> bool:
    """Whether every row made one token, inside the vocabulary and without an error."""
    if np.count_nonzero(result.error) or np.count_nonzero(result.num_sampled != 1):
        return False
    # as unsigned, a negative id is large
    return int(np.maximum.reduce(tokens.view(np.uint32))) < table.config.vocab_size


def broken_rows(table: RowTable, plan: StepPlan, result: StepResult) -> np.ndarray:
    """bool [S]: rows with a device error, without the token they owe, or with an id outside of the vocabulary."""
    samples = plan.num_logits > 0
    # as unsigned, a negative id is large
    outside = result.tokens[:, 0].astype(np.uint32) >= table.config.vocab_size
    wrong: np.ndarray = (result.error != 0) | (samples & (outside | (result.num_sampled != 1)))
    return wrong


def describe_failure(table: RowTable, plan: StepPlan, result: StepResult, row: int) -> tuple[int, Failure]:
    slot = int(plan.slots[row])
    error = int(result.error[row])
    why = ROW_ERRORS.get(RowError(error)) if error in RowError._value2member_map_ else None
    if why is None:
        why = "the device gave no valid token for this request"
    return slot, Failure(int(table.key[slot]), "device_error", why)


def append_tokens(table: RowTable, slots: I64, tokens: I32) -> StepColumns:
    """Append tokens[i] to slots[i] (distinct) and find out which rows end."""
    at = table.num_tokens[slots]
    table.flat[table.row_start[slots] + at] = tokens
    at += 1
    table.num_tokens[slots] = at
    count = len(slots)
    finish = (at >= table.max_total[slots]).view(np.uint8)
    finish *= LENGTH
    stop_token = np.full(count, -1, np.int32)
    # an id at which some running row stops: few tokens get here, and those are looked at one by one
    for i in table.stop_refs.take(tokens).nonzero()[0].tolist():
        slot, token = int(slots[i]), int(tokens[i])
        if token in table.stop_sets[slot] and at[i] >= table.min_total[slot]:
            finish[i] = FinishReason.STOP
            stop_token[i] = token
    return StepColumns(
        keys=table.key[slots],
        counts=np.ones(count, np.int32),
        tokens=tokens,
        finish=finish,
        stop_token=stop_token,
        num_cached=table.num_cached[slots],
    )


def select_logprobs(logprobs: Logprobs, rows: I64 | None, max_new: int) -> Logprobs:
    """The entries of the first token of `rows`, None = every row; a result has max_new entries a row."""
    if rows is None and max_new == 1:
        return logprobs
    return pick(logprobs, slice(None, None, max_new) if rows is None else rows * max_new)


def pick(logprobs: Logprobs, index: I64 | slice) -> Logprobs:
    return Logprobs(
        chosen=logprobs.chosen[index],
        rank=logprobs.rank[index],
        top_ids=logprobs.top_ids[index],
        top=logprobs.top[index],
    )


def collect_prompt_scores(
    table: RowTable, scored: list[ScoredPrompt], logprobs: Logprobs | None
) -> dict[int, Logprobs]:
    """Keep each row's part; -> request key -> the whole prompt's, for prompts that are complete now."""
    complete: dict[int, Logprobs] = {}
    if logprobs is None:
        return complete
    at = 0
    for row in scored:
        begin, at = at, at + row.count
        if table.generation[row.slot] != row.generation:
            continue
        entry = table.entry(row.slot)
        entry.prompt_scores.append(
            Logprobs(
                chosen=logprobs.chosen[begin:at].copy(),
                rank=logprobs.rank[begin:at].copy(),
                top_ids=logprobs.top_ids[begin:at, : row.num_top].copy(),
                top=logprobs.top[begin:at, : row.num_top].copy(),
            )
        )
        if sum(len(part.chosen) for part in entry.prompt_scores) < entry.request.num_prompt - 1:
            continue
        complete[entry.request.key] = Logprobs(
            chosen=np.concatenate([part.chosen for part in entry.prompt_scores]),
            rank=np.concatenate([part.rank for part in entry.prompt_scores]),
            top_ids=np.concatenate([part.top_ids for part in entry.prompt_scores]),
            top=np.concatenate([part.top for part in entry.prompt_scores]),
        )
        entry.prompt_scores = []
        entry.prompt_logprobs_sent = True
        table.scores_prompt[row.slot] = False
        table.num_prompt_scorers -= 1
    return complete
