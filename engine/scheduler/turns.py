"""How many decode turns the next step takes on the device: more and more while nothing but decoding goes on.

A request that arrives waits for what was submitted before it, and a stream's tokens come as many at a time as its step
had turns. So a step takes one turn whenever anything waits, begins or is prefilled, and twice as many as the one before
otherwise. Data replicas take several turns together or none does. A plan builder owns one; the scheduler asks.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.scheduler.budget import ChosenRows
from engine.scheduler.plan import InFlight
from engine.scheduler.state import State
from engine.scheduler.steady import SteadyRows
from engine.step import I32


class Turns:
    def __init__(self, state: State) -> None:
        self._state = state
        self._most = state.config.max_num_steps
        self._next = 1

    def possible(self, rows: ChosenRows) -> bool:
        """Nothing waits and all of `rows` decode, or there are none."""
        count, state = len(rows.slots), self._state
        return self._most > 1 and not len(state.waiting) and rows.num_steady == count <= state.config.max_turn_rows

    def take(self, steady: SteadyRows, rows: ChosenRows, in_flight: Iterable[InFlight]) -> ChosenRows | None:
        """`rows` with several turns each and the pages for them; None where the step is to be one of one turn.

        rows: what `steady` gives for the next step, `possible`.
        """
        num_steps = self._choose(rows)
        if num_steps == 1:
            return None
        table, kv = self._state.table, self._state.kv
        # - 1: the last token that a row may have is fed to nobody
        ends: I32 = np.minimum(rows.computed + num_steps, table.max_total[rows.slots] - 1)
        kv.trim(rows.slots, self.positions(rows, in_flight))
        return steady.further(rows, ends, num_steps) if kv.grow(rows.slots, ends) else None

    def begin_again(self) -> None:
        """This step has one turn, and the next of several begins with the fewest."""
        self._next = 1

    def _choose(self, rows: ChosenRows) -> int:
        state = self._state
        if not len(rows.slots):
            self.begin_again()
            return 1
        chosen, self._next = self._next, min(2 * self._next, self._most)
        left = state.table.max_total[rows.slots] - 1 - rows.computed
        room = state.config.max_model_len - int(np.maximum.reduce(rows.computed))
        return min(chosen, int(np.maximum.reduce(left)), room)

    def positions(self, rows: ChosenRows, in_flight: Iterable[InFlight]) -> I32:
        """The first position that a query of each row may have: a step in flight may take fewer turns than planned."""
        if self._most == 1:
            return rows.computed
        return rows.computed - sum(flight.plan.num_steps - 1 for flight in in_flight)
