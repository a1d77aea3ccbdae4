"""Scheduler: requests have tokens to compute; a step gives some of them a turn under one token budget.

    add -> waiting --schedule--> running --update--> finished        abort: from anywhere
              ^--------- preempted, or a step failed --------'

The core loop calls `schedule` (plan of step n + 1, while n runs), `commit_keys` (in the overlapped window), then
`update` or `fail` with step n. Always true: rows are scheduled in order, the first in order is never preempted, and
steps are collected in the order in which they were planned.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.errors import StepFailed, check
from engine.request import Request
from engine.scheduler.budget import (
    Chosen,
    ChosenRows,
    add_rows,
    choose_running,
    drop_rows,
    join_rows,
    no_rows,
    other_rows,
)
from engine.scheduler.builder import PlanBuilder
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.plan import InFlight
from engine.scheduler.queues import Entry
from engine.scheduler.room import Room
from engine.scheduler.state import State
from engine.scheduler.stats import SchedulerGauges
from engine.scheduler.update import Failure, StepColumns, apply_result, collect_prompt_scores, empty_columns
from engine.specs.cache import CacheLayout
from engine.step import I32, I64, StepPlan, StepResult

MAX_UNEXPLAINED_FAILURES = 1  # failed steps without a named culprit that a request survives

PAGE_TURNS = 4  # turns whose pages decode rows take at once while pages are plenty


class Scheduler:
    def __init__(self, config: SchedulerConfig, layout: CacheLayout) -> None:
        self.config = config
        self.state = State(config, layout)
        self.in_flight: list[InFlight] = []  # the oldest first
        self._builder = PlanBuilder(self.state)
        self._room = Room(self.state)
        self._failures: list[Failure] = []

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidValue, NeverFits or Overloaded; then nothing has changed."""
        self.state.add(request)

    def abort(self, keys: Iterable[int]) -> int:
        """End requests in any state, without output. -> how many of the keys were known."""
        return self.state.abort(keys)

    @property
    def has_work(self) -> bool:
        return bool(self.state.slot_of or len(self.state.waiting) or self.in_flight)

    def reset_prefix_cache(self) -> None:
        """Every later lookup misses; running requests go on undisturbed."""
        self.state.prefix.forget()

    def keys_of(self, slots: I32) -> I64:
        """Request keys of running rows, [n]."""
        keys: I64 = self.state.table.key[slots]
        return keys

    def take_failures(self) -> list[Failure]:
        """Requests that ended in an error since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def stats(self) -> SchedulerGauges:
        return self.state.stats()

    def check_integrity(self) -> None:
        """Every invariant that can be told from the state. Raises InternalError."""
        self.state.check_integrity()
        self._builder.check_integrity()

    # -- one step ------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step's plan; None when no row can do anything before a step in flight is collected."""
        chosen = self.choose()
        return self.plan(chosen, chosen.several)

    def choose(self) -> Chosen:
        """The running rows of the next step; `plan` follows."""
        check(len(self.in_flight) < self.config.max_in_flight, f"{len(self.in_flight)} steps are in flight already")
        state = self.state
        score_budget = self.config.max_prompt_logprob_tokens
        rows = self._builder.steady_rows()
        slots = self._builder.other_slots()
        if len(slots):
            budget = self.config.max_num_batched_tokens - len(rows.slots)
            others, score_budget = choose_running(state.table, slots, budget)
            rows = join_rows(rows, others)
        return Chosen(rows, score_budget, self._builder.turns.possible(rows))

    def plan(self, chosen: Chosen, several: bool) -> StepPlan | None:
        """What `schedule` says. several: the step may have several turns, for which `chosen` must say so too."""
        rows, state = chosen.rows, self.state
        preempted = state.counters.preemptions
        turned = None
        if several:
            turned = self._builder.turns.take(self._builder.steady, rows, self.in_flight)
        else:
            self._builder.turns.begin_again()
        rows = self._with_pages(rows) if turned is None else turned
        opened: list[tuple[int, int]] = []
        # a step that had to preempt begins nobody: what it freed belongs to the rows that lacked it
        if len(state.waiting) and state.table.num_free_slots and preempted == state.counters.preemptions:
            rows, opened = self._admit(rows, chosen.score_budget)
        if not len(rows.slots):
            return None
        flight = self._builder.build(rows, opened)
        self.in_flight.append(flight)
        return flight.plan

    def _with_pages(self, rows: ChosenRows) -> ChosenRows:
        """Allocate what the rows will write; the last in order give way while pages are short."""
        if not len(rows.slots):
            return rows
        kv, steady = self.state.kv, self._builder.steady
        positions = self._builder.turns.positions(rows, self.in_flight)
        if rows.num_steady and not steady.page_turns and kv.has_spare(len(rows.slots)):
            # pages are plenty: those of some turns at once cost little more than those of one
            ends = rows.ends.copy()
            ends[: rows.num_steady] += PAGE_TURNS - 1  # the last of these turns ends so much later
            np.minimum(ends, self.state.table.max_total[rows.slots], out=ends)
            kv.trim(rows.slots, positions)
            if kv.grow(rows.slots, ends):
                steady.page_turns = PAGE_TURNS - 1
                return rows
        lacking = rows
        if steady.page_turns:
            steady.page_turns -= 1
            lacking, positions = other_rows(rows), positions[rows.num_steady :]
        kv.trim(lacking.slots, positions)
        return rows if kv.grow(lacking.slots, lacking.ends) else self._preempt_for(rows)

    def _preempt_for(self, rows: ChosenRows) -> ChosenRows:
        """The rows that get their pages when the last in order have given way."""
        kv = self.state.kv
        kv.trim(rows.slots, self._builder.turns.positions(rows, self.in_flight))
        while len(rows.slots) and not kv.grow(rows.slots, rows.ends):
            victim = self._victim()
            if victim is None:
                # the first in order is alone: what it lacks is held by steps in flight
                check(len(self.in_flight) > 0, "one request alone does not fit into the pages")
                self._builder.forget_steady()
                return no_rows()
            rows = drop_rows(rows, rows.slots == victim)
            self._builder.forget_steady()
            self.state.preempt(victim)
        return rows

    def _victim(self) -> int | None:
        """The last in order that has no right to finish; never the first in order (S-6)."""
        slots: list[int] = self.state.running.slots[1:].tolist()
        for slot in reversed(slots):
            if self.state.table.entry(slot).request.num_preemptions < self.config.max_preemptions:
                return slot
        return slots[-1] if slots else None

    def _admit(self, rows: ChosenRows, score_budget: int) -> tuple[ChosenRows, list[tuple[int, int]]]:
        """Open waiting requests, in order, while slots, tokens and pages last. -> (all rows, [(slot, computed)])."""
        state, table = self.state, self.state.table
        budget = self.config.max_num_batched_tokens - int(np.add.reduce(rows.new))
        added: list[tuple[int, int, int]] = []  # slot, computed, new
        passed: list[Entry] = []
        while budget > 0 and table.num_free_slots and len(passed) <= self.config.max_prefix_skips:
            entry = state.waiting.peek()
            if entry is None:
                break
            if self._room.waits_for_prefix(entry):
                passed.append(state.waiting.pop())
                continue
            scores = self._room.scores(entry)
            opening = None if scores and score_budget <= 0 else self._room.find(entry)
            if opening is None:
                break
            state.waiting.pop()
            slot = state.open(entry, opening.hit)
            computed = int(table.num_computed[slot])
            new = min(int(table.length[slot]) - computed, int(table.chunk[slot]), budget)
            if scores:
                new = min(new, score_budget)
                score_budget -= new
            budget -= new
            self._begin_pages(slot, computed + new, len(rows.slots) + len(added) + 1)
            added.append((slot, computed, new))
        for entry in passed:
            state.waiting.push(entry)
        if not added:
            return rows, []
        return add_rows(rows, added), [(slot, computed) for slot, computed, _ in added]

    def _begin_pages(self, slot: int, end: int, num_rows: int) -> None:
        """The first pages of a row that begins. Nothing to trim: it has no column that its first token does not see."""
        table, kv = self.state.table, self.state.kv
        if end == table.length[slot] and kv.has_spare(num_rows):
            # it decodes from the next step on: as much ahead as the others may be
            end = min(end + PAGE_TURNS - 1, table.max_total.item(slot))
        check(kv.grow_row(slot, end), "pages that were counted are not there")

    # -- results -------------------------------------------------------------------------------------------------------

    def commit_keys(self) -> None:
        """Work that the next step wants done, while the device works on this one.

        Keys what submitted steps compute of prompts, and some of what is generated.
        """
        self._builder.settle()
        known = self.state.prefix.commit_known()
        if known and self.in_flight:
            # whichever of them computes it: a step that fails takes those behind it along
            self.in_flight[-1].keyed += known
        turns = self.in_flight[-1].plan.num_steps if self.in_flight else 1
        self.state.prefix.commit(len(self.state.running) * turns)

    def update(self, plan: StepPlan, result: StepResult) -> StepColumns | None:
        """Take in the oldest step's result. -> what the clients get, None = nothing."""
        state = self.state
        flight = self._collect(plan)
        applied = apply_result(state.table, flight, result)
        columns = applied.columns
        if flight.scored:
            complete = collect_prompt_scores(state.table, flight.scored, result.prompt_logprobs)
            if complete:
                columns = empty_columns() if columns is None else columns
                columns.prompt_logprobs = complete
        for slot in applied.finished:
            state.finish(slot)
        for slot, failure in applied.failed:
            state.finish(slot, keep_keys=False)
            self._failures.append(failure)
        return columns

    def _collect(self, plan: StepPlan) -> InFlight:
        check(len(self.in_flight) > 0 and self.in_flight[0].plan is plan, "steps are collected in order of submission")
        flight = self.in_flight.pop(0)
        if flight.held:
            self.state.kv.release_sources(flight.held)
        return flight

    def fail(self, plan: StepPlan | None, error: StepFailed) -> None:
        """The oldest step failed: its culprits end, everybody else in it and in later steps is computed again.

        None: a step failed in which this scheduler had no plan (another replica's).

        Without named rows a request survives one such step; with the second it ends, so that the engine cannot fail
        for ever. Steps in flight meanwhile read what this one should have written: their rows start again too.
        """
        state = self.state
        tainted = [*([] if plan is None else [self._collect(plan)]), *self.in_flight]
        culprits = [] if plan is None else self._live_slots(plan, error.rows)
        if error.cache_lost:
            state.prefix.forget()
            restarted = state.running.slots.tolist()
        else:
            restarted = []
            for flight in tainted:
                state.kv.withdraw(flight.keyed)
                restarted += self._live_slots(flight.plan)
        for slot in dict.fromkeys(restarted):
            entry = state.leave(slot, keep_keys=not error.cache_lost)
            if slot in culprits:
                entry.num_failures += 1
            if slot in culprits and (error.rows or entry.num_failures > MAX_UNEXPLAINED_FAILURES):
                state.end(entry)
                self._failures.append(Failure(entry.request.key, "step_failed", "the step of this request failed"))
            else:
                state.wait(entry)
        self.check_integrity()

    def _live_slots(self, plan: StepPlan, rows: tuple[int, ...] = ()) -> list[int]:
        """Slots of the plan's rows (of `rows` alone, if given) whose tenancy still lasts."""
        live = self.state.table.generation[plan.slots] == plan.generation
        chosen = [row for row in rows if 0 <= row < plan.num_rows] if rows else range(plan.num_rows)
        return [int(plan.slots[row]) for row in chosen if live[row]]
