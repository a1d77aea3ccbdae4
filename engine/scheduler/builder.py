"""PlanBuilder: from chosen rows to the StepPlan; it knows which slots the device has open.

While nobody comes or goes the rows of one step are those of the next (steady.py), which makes a decode step cheap.
"""

from __future__ import annotations

import numpy as np

from engine.scheduler.budget import ChosenRows
from engine.scheduler.config import choose_bucket
from engine.scheduler.opened import opened_rows
from engine.scheduler.plan import InFlight, PlanRing, choose_sampler, fill_rows, score_prompts
from engine.scheduler.state import State
from engine.scheduler.steady import SteadyRows, fill_steady, find_steady
from engine.step import I32, StepPlan


class PlanBuilder:
    def __init__(self, state: State) -> None:
        self._state = state
        self._ring = PlanRing(state.config)
        self._steady: SteadyRows | None = None
        self._begun = -1  # state.begun for which `_steady` holds
        self._on_device: set[int] = set()  # slots that a plan has opened and none has closed

    def steady_rows(self) -> ChosenRows | None:
        """The rows of the last step that have not ended, one token on; None if a tenancy has begun since."""
        state, steady = self._state, self._steady
        if steady is not None and self._begun != state.begun:
            steady = None
        if steady is not None and (state.left or steady.turns_left <= 0):
            steady = steady.without(state.left, state.table)
        self._steady = steady
        return None if steady is None else steady.next(self._ring.ones)

    def forget_steady(self) -> None:
        """The rows that `steady_rows` gave are not used as they are."""
        self._steady = None

    def build(self, rows: ChosenRows, opened: list[tuple[int, int]]) -> InFlight:
        """opened: (slot, tokens computed before) of rows that begin in this step."""
        state, table = self._state, self._state.table
        count = len(rows.slots)
        if self._steady is not None and self._begun == state.begun:
            buffers, logit_rows = fill_steady(self._ring, table, rows, self._steady)
            sampler, num_logprobs, bucket = self._steady.sampler, self._steady.num_logprobs, self._steady.bucket
            num_tokens = count
        else:
            num_tokens = int(np.add.reduce(rows.new))
            buffers, logit_rows, sampling = fill_rows(self._ring, table, rows)
            sampler, num_logprobs = choose_sampler(table, sampling)
            bucket = choose_bucket(state.config, num_tokens, count)
            self._steady, self._begun = None, state.begun
            if count == len(state.running):
                self._steady = find_steady(table, rows, sampling, (sampler, num_logprobs, bucket))
        copies, held = state.kv.take_copies()
        scores, scored = score_prompts(table, rows)
        state.counters.steps += 1
        plan = StepPlan(
            step_id=state.counters.steps,
            bucket=bucket,
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
        return InFlight(plan, rows.slots, held, state.prefix.submitted(), scored)

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
