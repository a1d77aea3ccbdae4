"""SteadyRows: the decode rows of the last step, kept from step to step, so that the next one is the same, one token on.

A row is steady from the step in which it samples until it ends, is taken out, or has all the tokens it may have: its
next token is the one that the device sampled last. Rows that begin join behind the others, rows that leave are cut out;
the arrays are never written, because steps in flight look at them. A plan builder owns one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engine.errors import check
from engine.kv.manager import KVManager
from engine.scheduler.budget import ChosenRows
from engine.scheduler.plan import choose_sampler
from engine.scheduler.table import RowTable
from engine.step import I32, I64, Sampler

NEVER = 1 << 30


@dataclass(slots=True)
class SteadyRows:
    slots: I64  # [S] in the order in which they joined
    ends: I32  # [S] tokens computed with the last step
    turns_left: int  # steps until a row has all the tokens it may have; never too many
    sampler: Sampler  # the weakest that serves them, NONE = no rows
    num_logprobs: int  # most that one of them wants
    page_turns: int = 0  # further steps for which their pages are there, as far as they may go

    def next(self, ones: I32) -> ChosenRows:
        """The same rows, one token on. ones: i32 [>= S]."""
        computed = self.ends
        self.ends = computed + 1
        self.turns_left -= 1
        count = len(self.slots)
        return ChosenRows(self.slots, computed, ones[:count], count, self.ends, count)

    def further(self, rows: ChosenRows, ends: I32, num_steps: int) -> ChosenRows:
        """`rows`, which `next` has given, with several turns each. ends: after these; their pages are there."""
        self.ends = ends
        self.turns_left -= num_steps - 1
        self.page_turns = max(0, self.page_turns - num_steps)
        return replace(rows, ends=ends, num_steps=num_steps)

    def kept(self, table: RowTable) -> tuple[SteadyRows, I64]:
        """These rows but for those whose tenancy ended (their max_total is 0) or that have all their tokens.

        -> (the rows, the slots of the others)
        """
        left = table.max_total[self.slots] - table.length[self.slots]
        stays = (left > 0).nonzero()[0]
        if not len(stays):
            return no_rows_steady(), self.slots
        if len(stays) < len(left):
            gone = self.slots[(left <= 0).nonzero()[0]]
            left, slots = left[stays], self.slots[stays]
            sampler, num_logprobs = choose_sampler(table, slots)
            return SteadyRows(slots, self.ends[stays], least(left), sampler, num_logprobs, self.page_turns), gone
        self.turns_left = least(left)
        return self, self.slots[:0]

    def joined(self, table: RowTable, kv: KVManager, slots: I64, ends: I32, choice: tuple[Sampler, int]) -> SteadyRows:
        """With `slots`, which have sampled in the step just planned, behind these; but for those that then are full.

        choice: what choose_sampler says of `slots`.
        """
        left = table.max_total[slots] - table.length[slots]
        if np.count_nonzero(left > 0) < len(left):
            stays = (left > 0).nonzero()[0]
            left, slots, ends = left[stays], slots[stays], ends[stays]
            choice = choose_sampler(table, slots)
        if not len(slots):
            return self
        sampler, num_logprobs = choice
        turns, page_turns = least(left), 0
        if len(self.slots):
            ahead = np.minimum(ends + self.page_turns, table.max_total[slots])
            page_turns = self.page_turns if self.page_turns and kv.hold(slots, ahead) else 0
            slots, ends = np.concatenate((self.slots, slots)), np.concatenate((self.ends, ends))
            sampler, num_logprobs = max(sampler, self.sampler), max(num_logprobs, self.num_logprobs)
            turns = min(turns, self.turns_left)
        return SteadyRows(slots, ends, turns, sampler, num_logprobs, page_turns)

    def check_integrity(self, table: RowTable, kv: KVManager, running: I64) -> None:
        """What is kept in place equals what the tables say. Raises InternalError."""
        now = table.length[running]
        computed = table.num_computed[running]
        # its last token is on the device alone, nothing else is to compute, and it may have more
        decodes = (now == computed + 1) & (computed >= table.num_known[running]) & (now < table.max_total[running])
        tenanted = table.length[self.slots] > 0  # the others are cut out before the next step
        left = (table.max_total[self.slots] - table.length[self.slots])[tenanted]
        check(self.turns_left <= min(left.tolist(), default=NEVER), "a steady row has fewer turns left")
        rows, _ = replace(self).kept(table)
        check(sorted(rows.slots.tolist()) == sorted(running[decodes].tolist()), "steady rows are not those that decode")
        check((rows.ends == table.num_computed[rows.slots]).all(), "steady rows are at the wrong tokens")
        check((rows.sampler, rows.num_logprobs) == choose_sampler(table, rows.slots), "the steady sampler is off")
        ends = np.minimum(rows.ends + rows.page_turns, table.max_total[rows.slots])
        for slot, end in zip(rows.slots.tolist(), ends.tolist(), strict=True):
            check(kv.holds(slot, end), f"slot {slot}: its pages of the next turns are not there")


def least(left: I32) -> int:
    return int(np.minimum.reduce(left))


def no_rows_steady() -> SteadyRows:
    none = np.zeros(0, np.int32)
    return SteadyRows(none.astype(np.int64), none, NEVER, Sampler.NONE, -1)
