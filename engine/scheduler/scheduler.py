"""Scheduler: requests have tokens to compute; a step gives some of them a turn under one token budget.

    add -> waiting --schedule--> running --update--> finished        abort: from anywhere
              ^--------- preempted, or a step failed --------'

The core loop calls `schedule` (plan of step n + 1, while n runs), `commit_keys` (in the overlapped window), then
`update` or `fail` with step n. Always true: a request is in exactly one place and ends exactly once; every page a row
holds is in the manager's tables; rows are scheduled in order, and the first in order is never preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.errors import InvalidValue, Overloaded, StepFailed, check
from engine.kv.manager import Hit, KVManager
from engine.request import Request, RequestStatus
from engine.scheduler.admission import admit_check
from engine.scheduler.budget import share_budget, tokens_to_compute
from engine.scheduler.config import SchedulerConfig, choose_bucket
from engine.scheduler.integrity import check_state, check_writers
from engine.scheduler.plan import (
    ChosenRows,
    InFlight,
    PlanRing,
    choose_sampler,
    fill_rows,
    opened_rows,
    score_prompts,
)
from engine.scheduler.prefix import PrefixKeys
from engine.scheduler.queues import Entry, RunningOrder, WaitingQueue
from engine.scheduler.stats import Counters, SchedulerGauges
from engine.scheduler.steady import SteadyRows, fill_steady, find_steady
from engine.scheduler.table import RowTable, wants_prompt_scores
from engine.scheduler.update import Failure, StepColumns, apply_result, collect_prompt_scores, empty_columns
from engine.specs.cache import CacheLayout
from engine.step import I32, StepPlan, StepResult

MAX_UNEXPLAINED_FAILURES = 1  # failed steps without a named culprit that a request survives


@dataclass(frozen=True, slots=True)
class Opening:
    """A waiting request that may begin now."""

    entry: Entry
    hit: Hit | None

    def hit_tokens(self, unit_tokens: int) -> int:
        return 0 if self.hit is None else self.hit.num_units * unit_tokens


class Scheduler:
    def __init__(self, config: SchedulerConfig, layout: CacheLayout) -> None:
        self.config = config
        self.kv = KVManager(layout, config.max_num_seqs, config.max_model_len, config.max_chunk)
        self.table = RowTable(config, layout.unit_tokens)
        self.prefix = PrefixKeys(self.table, self.kv, config.enable_prefix_caching)
        self.waiting = WaitingQueue()
        self.running = RunningOrder(config.max_num_seqs)
        self.in_flight: deque[InFlight] = deque()
        self.counters = Counters()
        self.capacity = self.kv.capacity_tokens(config.max_model_len)  # tokens of one request alone
        self._ring = PlanRing(config)
        self._slot_of: dict[int, int] = {}  # request key -> slot, of running requests
        self._closed: dict[int, None] = {}  # slots that the device still takes for open, in order
        self._on_device: set[int] = set()  # slots that a plan has opened and none has closed
        self._failures: list[Failure] = []
        self._blocked: tuple[Entry, list[int]] | None = None  # the head that did not fit, and the free pages then
        self._steady: SteadyRows | None = None
        self._has_windows = any(table.window is not None for table in self.kv.tables)

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidValue, NeverFits or Overloaded; then nothing has changed."""
        admit_check(request, self.config, self.capacity)
        if request.key in self.waiting or request.key in self._slot_of:
            raise InvalidValue(f"key: {request.key} is in use", param="key")
        if len(self.waiting) >= self.config.max_waiting:
            raise Overloaded(
                f"{len(self.waiting)} requests are waiting already, the limit is {self.config.max_waiting}"
            )
        self.counters.arrivals += 1
        request.arrival = self.counters.arrivals
        request.status = RequestStatus.WAITING
        rank = 0
        if self.config.policy == "priority":
            rank = self.counters.steps + request.priority * self.config.aging_steps
        limit = min(self.config.max_model_len, self.capacity)
        wanted = request.params.max_tokens
        max_total = limit if wanted is None else min(request.num_prompt + wanted, limit)
        self.waiting.push(Entry(request, (rank, request.arrival), max_total))

    def abort(self, keys: Iterable[int]) -> int:
        """End requests in any state, without output. -> how many of the keys were known."""
        known = 0
        for key in keys:
            entry = self.waiting.remove(key)
            if entry is None:
                slot = self._slot_of.get(key)
                if slot is None:
                    continue
                entry = self._leave(slot)
            entry.request.status = RequestStatus.FINISHED
            known += 1
        return known

    def running_keys(self) -> list[int]:
        """Keys of the running requests, the first in order first."""
        keys: list[int] = self.table.key[self.running.slots].tolist()
        return keys

    @property
    def has_work(self) -> bool:
        return bool(self._slot_of or len(self.waiting) or self.in_flight)

    def reset_prefix_cache(self) -> None:
        """Every later lookup misses; running requests go on undisturbed."""
        self.prefix.forget()

    def take_failures(self) -> list[Failure]:
        """Requests that ended in an error since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def stats(self) -> SchedulerGauges:
        counters = self.counters
        return SchedulerGauges(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_usage=self.kv.usage(),
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            num_preemptions=counters.preemptions,
            step=counters.steps,
            num_recomputed=counters.recomputed,
        )

    # -- one step ------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step's plan; None when no row can do anything before a step in flight is collected."""
        check(len(self.in_flight) < self.config.max_in_flight, f"{len(self.in_flight)} steps are in flight already")
        preempted = self.counters.preemptions
        rows, score_budget = self._running_rows()
        opened: list[tuple[int, int]] = []
        if len(self.waiting) and self.table.num_free_slots and preempted == self.counters.preemptions:
            budget = self.config.max_num_batched_tokens - int(np.add.reduce(rows.new))
            rows, opened = self._admit(rows, budget, score_budget)
        if not len(rows.slots):
            return None
        return self._plan(rows, opened)

    def _plan(self, rows: ChosenRows, opened: list[tuple[int, int]]) -> StepPlan:
        steady = self._steady
        if steady is not None:
            buffers, logit_rows = fill_steady(self._ring, self.table, rows, steady)
            sampler, num_logprobs = steady.sampler, steady.num_logprobs
        else:
            buffers, logit_rows, sampling = fill_rows(self._ring, self.table, rows)
            choice = sampler, num_logprobs = choose_sampler(self.table, sampling)
            if len(rows.slots) == len(self.running):
                self._steady = find_steady(self.table, rows, sampling, choice)
        count, num_tokens = len(rows.slots), int(np.add.reduce(rows.new))
        copies, held = self.kv.take_copies()
        scores, scored = score_prompts(self.table, rows)
        opening = opened_rows(self.table, [slot for slot, _ in opened], [computed for _, computed in opened])
        self.counters.steps += 1
        plan = StepPlan(
            step_id=self.counters.steps,
            bucket=choose_bucket(self.config, num_tokens, count),
            slots=buffers.slots[:count],
            generation=buffers.generation[:count],
            num_computed=buffers.num_computed[:count],
            num_new=buffers.num_new[:count],
            num_logits=buffers.num_logits[:count],
            token_ids=buffers.token_ids[:num_tokens],
            positions=buffers.positions[:, :num_tokens],
            logit_rows=logit_rows,
            sampler=sampler,
            num_logprobs=num_logprobs,
            opened=opening,
            closed=self._take_closed(opened),
            page_deltas=self.kv.take_deltas(),
            copies=copies,
            prompt_logprobs=scores,
        )
        self.in_flight.append(InFlight(plan, held, self.prefix.submitted(), scored))
        return plan

    def _take_closed(self, opened: list[tuple[int, int]]) -> I32 | None:
        """Slots whose tenancy ended; opening a slot again says so by itself."""
        for slot, _ in opened:
            self._closed.pop(slot, None)
            self._on_device.add(slot)
        if not self._closed:
            return None
        closed = np.array(list(self._closed), np.int32)
        self._on_device.difference_update(self._closed)
        self._closed.clear()
        return closed

    def _running_rows(self) -> tuple[ChosenRows, int]:
        """(running rows with their share of the budget and pages for it, prompt positions still to be scored)."""
        table = self.table
        if self._steady is not None:
            if self._steady.turns_left > 0:
                return self._with_pages(self._steady.next(self._ring.ones)), self.config.max_prompt_logprob_tokens
            self._steady = None
        slots = self.running.slots.copy()
        computed = table.num_computed[slots]
        want = tokens_to_compute(table.length[slots], computed, table.max_total[slots])
        score_budget = self.config.max_prompt_logprob_tokens
        if len(slots) and int(np.maximum.reduce(want)) > 1:
            scores = table.scores_prompt[slots] if table.num_prompt_scorers else None
            budget = self.config.max_num_batched_tokens
            want = share_budget(want, table.chunk[slots], budget, score_budget, scores)
            if scores is not None:
                score_budget -= int(want[scores].sum())
        some = want > 0
        if np.count_nonzero(some) < len(some):
            slots, computed, want = slots[some], computed[some], want[some]
        rows = singles_first(slots, computed, want)
        return self._with_pages(rows), score_budget

    def _with_pages(self, rows: ChosenRows) -> ChosenRows:
        """Allocate what the rows will write; the last in order give way while pages are short."""
        if self._has_windows and len(rows.slots):
            self.kv.trim(rows.slots, rows.computed)
        while len(rows.slots) and not self.kv.grow(rows.slots, rows.ends):
            victim = self._victim()
            if victim is None:
                # the first in order is alone: what it lacks is held by steps in flight
                check(len(self.in_flight) > 0, "one request alone does not fit into the pages")
                return drop_rows(rows, rows.slots == rows.slots)
            rows = drop_rows(rows, rows.slots == victim)
            self._preempt(victim)
        return rows

    def _victim(self) -> int | None:
        """The last in order that has no right to finish; never the first in order (S-6)."""
        slots = self.running.slots[1:].tolist()
        for slot in reversed(slots):
            if self.table.entry(slot).request.num_preemptions < self.config.max_preemptions:
                return int(slot)
        return int(slots[-1]) if slots else None

    def _preempt(self, slot: int) -> None:
        self.counters.preemptions += 1
        self.counters.recomputed += int(self.table.num_computed[slot])
        entry = self._leave(slot)
        entry.request.num_preemptions += 1
        self._wait_again(entry)

    def _wait_again(self, entry: Entry) -> None:
        """Back to the queue, in front of all that arrived later; generated tokens are kept."""
        entry.request.status = RequestStatus.WAITING
        entry.prompt_scores = []
        entry.unit_keys = None
        self.waiting.push(entry)

    def _leave(self, slot: int, *, keep_keys: bool = True) -> Entry:
        """End the tenancy of a slot: key what it computed, release its pages."""
        self._steady = None
        self.prefix.closing(slot, keep=keep_keys)
        self.kv.close_row(slot)
        entry = self.table.close(slot)
        self.running.remove(entry.order, slot)
        del self._slot_of[entry.request.key]
        if slot in self._on_device:
            self._closed[slot] = None
        return entry

    # -- admission -----------------------------------------------------------------------------------------------------

    def _admit(self, rows: ChosenRows, budget: int, score_budget: int) -> tuple[ChosenRows, list[tuple[int, int]]]:
        """Open waiting requests, in order, while slots, tokens and pages last. -> (all rows, [(slot, computed)])."""
        opened: list[tuple[int, int]] = []
        added: list[tuple[int, int, int]] = []  # slot, computed, new
        passed: list[Entry] = []
        while budget > 0 and self.table.num_free_slots and len(passed) <= self.config.max_prefix_skips:
            entry = self.waiting.peek()
            if entry is None or (wants_prompt_scores(entry) and score_budget <= 0):
                break
            if self._waits_for_prefix(entry):
                passed.append(self.waiting.pop())
                continue
            opening = self._find_room(entry)
            if opening is None:
                break
            self.waiting.pop()
            slot = self._open(opening)
            computed = int(self.table.num_computed[slot])
            new = min(int(self.table.length[slot]) - computed, int(self.table.chunk[slot]), budget)
            if self.table.scores_prompt[slot]:
                new = min(new, score_budget)
                score_budget -= new
            budget -= new
            one = np.array([slot], np.int32)
            self.kv.trim(one, np.array([computed], np.int32))
            check(self.kv.grow(one, np.array([computed + new], np.int32)), "pages that were counted are not there")
            opened.append((slot, computed))
            added.append((slot, computed, new))
        for entry in passed:
            self.waiting.push(entry)
        if not added:
            return rows, opened
        slots, computeds, news = (np.array(column, np.int32) for column in zip(*added, strict=True))
        return singles_first(
            np.concatenate((rows.slots, slots)),
            np.concatenate((rows.computed, computeds)),
            np.concatenate((rows.new, news)),
        ), opened

    def _reads_cache(self, entry: Entry) -> bool:
        if not self.prefix.caches(entry) or wants_prompt_scores(entry):
            return False
        return not entry.request.params.skip_reading_prefix_cache

    def _waits_for_prefix(self, entry: Entry) -> bool:
        """Whether the next unit this request lacks is being computed by a row in front of it."""
        if not self._reads_cache(entry):
            return False
        computing = self.prefix.computing
        if entry.waits_for is None or entry.waits_for not in computing:
            entry.waits_for = None
            keys = self.prefix.keys(entry)
            most = self._max_hit_units(entry)
            hit = self.kv.find(keys, most) if most and keys[0] not in computing else None
            found = 0 if hit is None else hit.num_units
            if found < most and keys[found] in computing:
                entry.waits_for = keys[found]
        if entry.waits_for is None:
            return False
        return self.table.entry(computing[entry.waits_for]).order < entry.order

    def _max_hit_units(self, entry: Entry) -> int:
        """The last token is always computed: its logits are wanted."""
        known = entry.request.num_prompt + len(entry.request.outputs)
        return (known - 1) // self.kv.unit_tokens

    def _find_room(self, entry: Entry) -> Opening | None:
        """Look up the prefix cache and count pages; None when the request must wait."""
        free = self.kv.num_free()
        if self._blocked is not None:
            blocked, then = self._blocked
            if blocked is entry and len(self.running) and all(a <= b for a, b in zip(free, then, strict=True)):
                return None
        self._blocked = None
        request = entry.request
        known = request.num_prompt + len(request.outputs)
        protected = request.num_preemptions >= self.config.max_preemptions
        target = entry.max_total if protected else known
        hit = None
        if self._reads_cache(entry):
            keys, most = self.prefix.keys(entry), self._max_hit_units(entry)
            hit = self.kv.find(keys, most)
            if hit is not None and not self._fits(hit, target, free) and any(g.partial for g in hit.groups):
                # a partial copy holds one page more than the row itself will
                hit = self.kv.find(keys, most, partial=False)
        if not self._fits(hit, target, free):
            self._blocked = (entry, free)
            return None
        return Opening(entry, hit)

    def _fits(self, hit: Hit | None, num_tokens: int, free: list[int]) -> bool:
        """Whether a row may begin: the pages of its known tokens, beyond what running prompts will still ask for."""
        need = self.kv.admission_need(hit, num_tokens)
        if len(self.running):
            slots = self.running.slots
            reserved = self.kv.reserved(slots, self.table.reserve_to[slots])
            for i, pool in enumerate(self.kv.pools):
                # running rows are about to grow: leave some room, or what begins now is preempted at once
                need[i] += reserved[i] + min(len(self.running), pool.num_pages // 64)
        return all(n <= f for n, f in zip(need, free, strict=True))

    def _open(self, opening: Opening) -> int:
        entry, hit = opening.entry, opening.hit
        hit_tokens = opening.hit_tokens(self.kv.unit_tokens)
        if entry.num_cached < 0 and self._reads_cache(entry):
            self.counters.prefix_queries += entry.request.num_prompt
            self.counters.prefix_hits += hit_tokens
        self.counters.recomputed -= hit_tokens if entry.request.num_preemptions else 0
        self._steady = None
        slot = self.table.open(entry, hit_tokens)
        self.kv.open_row(slot, hit)
        self.prefix.opened(slot, entry, 0 if hit is None else hit.num_units)
        if entry.request.num_preemptions >= self.config.max_preemptions:
            self.table.reserve_to[slot] = entry.max_total
        self.running.add(entry.order, slot)
        self._slot_of[entry.request.key] = slot
        entry.request.status = RequestStatus.RUNNING
        return slot

    # -- results -------------------------------------------------------------------------------------------------------

    def commit_keys(self) -> None:
        """Key some of the generated units that are collected. Called while the device works."""
        self.prefix.commit(len(self.running))

    def update(self, plan: StepPlan, result: StepResult) -> StepColumns | None:
        """Take in the oldest step's result. -> what the clients get, None = nothing."""
        flight = self._collect(plan)
        applied = apply_result(self.table, plan, result)
        columns = applied.columns
        if flight.scored:
            complete = collect_prompt_scores(self.table, flight.scored, result.prompt_logprobs)
            if complete:
                columns = empty_columns() if columns is None else columns
                columns.prompt_logprobs = complete
        for slot in applied.finished:
            self._leave(slot).request.status = RequestStatus.FINISHED
        for slot, failure in applied.failed:
            self._leave(slot, keep_keys=False).request.status = RequestStatus.FINISHED
            self._failures.append(failure)
        return columns

    def _collect(self, plan: StepPlan) -> InFlight:
        check(len(self.in_flight) > 0 and self.in_flight[0].plan is plan, "steps are collected in order of submission")
        flight = self.in_flight.popleft()
        if flight.held:
            self.kv.release_sources(flight.held)
        return flight

    def fail(self, plan: StepPlan, error: StepFailed) -> None:
        """The oldest step failed: its culprits end, everybody else in it and in later steps is computed again.

        Without named rows a request survives one such step; with the second it ends, so that the engine cannot fail
        for ever. Steps in flight meanwhile read what this one should have written: their rows start again too.
        """
        flight = self._collect(plan)
        tainted = [flight, *self.in_flight]
        if error.cache_lost:
            self.prefix.forget()
            restarted = dict.fromkeys(self.running.slots.tolist())
        else:
            restarted = {}
            for other in tainted:
                self.kv.withdraw(other.keyed)
                restarted.update(dict.fromkeys(self._live_slots(other.plan)))
        in_step = self._live_slots(plan)
        culprits = set(in_step)
        if error.rows:
            live = self.table.generation[plan.slots] == plan.generation
            culprits = {int(plan.slots[row]) for row in error.rows if 0 <= row < plan.num_rows and live[row]}
        for slot in restarted:
            entry = self._leave(slot, keep_keys=not error.cache_lost)
            if slot in culprits:
                entry.num_failures += 1
            if slot in culprits and (error.rows or entry.num_failures > MAX_UNEXPLAINED_FAILURES):
                entry.request.status = RequestStatus.FINISHED
                self._failures.append(Failure(entry.request.key, "step_failed", "the step of this request failed"))
            else:
                self._wait_again(entry)
        self.check_integrity()

    def _live_slots(self, plan: StepPlan) -> list[int]:
        slots: list[int] = plan.slots[self.table.generation[plan.slots] == plan.generation].tolist()
        return slots

    def check_integrity(self) -> None:
        """Every invariant that can be told from the state. Raises InternalError."""
        check_state(self.table, self.running, self.waiting, self._slot_of)
        check_writers(self.kv, self.table, self.running)
        self.prefix.check_integrity()
        self.kv.check_integrity()


def singles_first(slots: I32, computed: I32, new: I32) -> ChosenRows:
    """Rows with one new token first, both parts in order."""
    single = new == 1
    count = int(np.count_nonzero(single))
    if count == len(new):
        return ChosenRows(slots, computed, new, count, computed + new)
    index = np.concatenate((np.flatnonzero(single), np.flatnonzero(~single)))
    slots, computed, new = slots[index], computed[index], new[index]
    return ChosenRows(slots, computed, new, count, computed + new)


def drop_rows(rows: ChosenRows, gone: np.ndarray) -> ChosenRows:
    return singles_first(rows.slots[~gone], rows.computed[~gone], rows.new[~gone])
