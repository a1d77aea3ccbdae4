"""PlanBuilder: from chosen rows to the StepPlan; it knows which slots the device has open, and which rows only go on.

Running rows are steady (steady.py), full (all their tokens are planned), or others: those still have known tokens to
compute. So a step looks one by one at the few others alone, and a decode step beside a prompt is a decode step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.scheduler.budget import ChosenRows
from engine.scheduler.config import choose_bucket
from engine.scheduler.opened import opened_rows
from engine.scheduler.plan import InFlight, PlanRing, choose_sampler, fill_rows, score_prompts
from engine.scheduler.state import State
from engine.scheduler.steady import SteadyRows, no_rows_steady
from engine.scheduler.turns import Turns
from engine.step import I32, I64, Bucket, Sampler, StepPlan


@dataclass(slots=True)
class Begins:
    """Rows of the last plan that were not steady: some begin to be. choice: what choose_sampler says of `sampling`."""

    rows: ChosenRows
    sampling: I64  # rows of the plan
    opened: list[tuple[int, int]]
    choice: tuple[Sampler, int]


class PlanBuilder:
    def __init__(self, state: State) -> None:
        self._state = state
        self._ring = PlanRing(state.config)
        self.steady: SteadyRows = no_rows_steady()
        self.turns = Turns(state)
        self._others: list[int] | None = []  # slots in order; None = look at every running row
        self._full: set[int] = set()  # slots taken out of `steady` whose tenancy lasts
        self._begins: Begins | None = None  # what `settle` has to do
        self._bucket = (-1, -1, Bucket(tokens=0, rows=0))  # tokens, rows, their bucket: that of the last plan
        self._on_device: set[int] = set()  # slots that a plan has opened and none has closed

    def steady_rows(self) -> ChosenRows:
        """The rows that go on from the last step, one token on."""
        self.settle()
        state = self._state
        if state.left:
            self._forget(state.left)
        return self.steady.next(self._ring.ones)

    def _forget(self, left: list[int]) -> None:
        """Rows that are not there any more."""
        if not self._full.issuperset(left):
            self._cut()
            if self._others:
                entries = self._state.table.entries
                self._others = [slot for slot in self._others if entries[slot] is not None]
        self._full.difference_update(left)

    def other_slots(self) -> I64:
        """Running rows that `steady_rows` did not give and that may have tokens to compute, in order."""
        if self._others is None:
            return self._state.running.slots.copy()
        return np.array(self._others, np.int64)

    def forget_steady(self) -> None:
        """The rows that `steady_rows` gave are not used as they are."""
        self.steady, self._others = no_rows_steady(), None
        self._full.clear()
        self._begins = None

    def build(self, rows: ChosenRows, opened: list[tuple[int, int]]) -> InFlight:
        """opened: (slot, tokens computed before) of rows that begin in this step."""
        state, table = self._state, self._state.table
        count, num_steady = len(rows.slots), rows.num_steady
        buffers, logit_rows, sampling = fill_rows(self._ring, table, rows)
        num_tokens = num_steady
        sampler, num_logprobs = self.steady.sampler, self.steady.num_logprobs
        if count > num_steady:
            num_tokens += int(np.add.reduce(rows.new[num_steady:]))
            begins = Begins(rows, sampling, opened, choose_sampler(table, rows.slots[sampling]))
            sampler, num_logprobs = max(sampler, begins.choice[0]), max(num_logprobs, begins.choice[1])
            self._begins = begins
        copies, held = state.kv.take_copies()
        scores, scored = score_prompts(table, rows)
        state.counters.steps += 1
        plan = StepPlan(
            step_id=state.counters.steps,
            num_steps=rows.num_steps,
            bucket=self._choose_bucket(num_tokens, count),
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
            opened=opened_rows(table, opened) if opened else None,
            closed=self._take_closed(opened),
            page_deltas=state.kv.take_deltas(),
            copies=copies,
            prompt_logprobs=scores,
        )
        return InFlight(plan, rows.slots, held, [], scored)

    def settle(self) -> None:
        """Make the next step's rows out of the last plan's: while the device works, or else when they are wanted."""
        if self._begins is not None:
            self._sort_out(self._begins)
            self._begins = None
        if self.steady.turns_left <= 0:
            self._cut()

    def _cut(self) -> None:
        """Take out steady rows that have left or are full."""
        self.steady, full = self.steady.kept(self._state.table)
        self._full.update(full.tolist())

    def _sort_out(self, begins: Begins) -> None:
        """Rows that sample go on by themselves from now on; the others are looked at again."""
        rows, sampling, opened = begins.rows, begins.sampling, begins.opened
        sampled = rows.slots[sampling]
        if self._others is None:
            before: list[int] = self._state.running.slots.tolist()
        else:
            before = self._others + [slot for slot, _ in opened]
        gone = set(sampled.tolist())
        entries = self._state.table.entries
        others = [slot for slot in before if slot not in gone and entries[slot] is not None]
        if opened and len(others) > 1:
            others.sort(key=lambda slot: self._state.table.entry(slot).order)
        self._others = others
        self.steady = self.steady.joined(self._state.table, self._state.kv, sampled, rows.ends[sampling], begins.choice)

    def _choose_bucket(self, num_tokens: int, num_rows: int) -> Bucket:
        tokens, rows, bucket = self._bucket
        if tokens != num_tokens or rows != num_rows:
            bucket = choose_bucket(self._state.config, num_tokens, num_rows)
            self._bucket = (num_tokens, num_rows, bucket)
        return bucket

    def _take_closed(self, opened: list[tuple[int, int]]) -> I32 | None:
        """Slots whose tenancy ended; opening a slot again says so by itself."""
        left, self._state.left = self._state.left, []
        for slot, _ in opened:
            self._on_device.add(slot)
        if not left:
            return None
        begun = {slot for slot, _ in opened}
        closed = [slot for slot in dict.fromkeys(left) if slot in self._on_device and slot not in begun]
        self._on_device.difference_update(closed)
        return np.array(closed, np.int32) if closed else None

    def check_integrity(self) -> None:
        """The kept rows equal those that the tables name. Raises InternalError."""
        state = self._state
        self.settle()
        if self._others is None:
            return
        self.steady.check_integrity(state.table, state.kv, state.running.slots)
