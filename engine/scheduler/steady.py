"""SteadyRows: the decode rows of the last step, kept while nobody comes or goes, so that the next step is the same.

Valid as long as no tenancy begins: then every row has one token to compute, which the device sampled in the step
before, and every row samples. Rows that end, or reach their length, are taken out. A plan builder owns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.scheduler.budget import ChosenRows
from engine.scheduler.config import choose_bucket
from engine.scheduler.plan import PlanBuffers, PlanRing, choose_sampler
from engine.scheduler.table import RowTable
from engine.step import I32, I64, LAST_TOKEN, Bucket, Sampler


@dataclass(slots=True)
class SteadyRows:
    slots: I64  # [S]
    generation: I32  # [S]
    ends: I32  # [S] tokens computed with the last step
    turns_left: int  # steps until a row has all the tokens it may have
    sampler: Sampler
    num_logprobs: int
    bucket: Bucket

    def next(self, ones: I32) -> ChosenRows:
        """The same rows, one token on. ones: i32 [>= S]."""
        computed = self.ends
        self.ends = computed + 1
        self.turns_left -= 1
        count = len(self.slots)
        return ChosenRows(self.slots, computed, ones[:count], count, self.ends)

    def without(self, left: Sequence[int], table: RowTable) -> SteadyRows | None:
        """These rows but for the slots in `left` and those that have all their tokens; None when none is left."""
        stays = table.length[self.slots] < table.max_total[self.slots]
        for slot in left:
            stays &= self.slots != slot
        slots = self.slots[stays]
        if not len(slots):
            return None
        sampler, num_logprobs = choose_sampler(table, slots)
        bucket = choose_bucket(table.config, len(slots), len(slots))
        return SteadyRows(
            slots, self.generation[stays], self.ends[stays], turns_left(table, slots), sampler, num_logprobs, bucket
        )


def turns_left(table: RowTable, slots: I64) -> int:
    """Steps until one of the rows has all the tokens it may have."""
    return int(np.minimum.reduce(table.max_total[slots] - table.length[slots]))


def find_steady(
    table: RowTable, rows: ChosenRows, sampling: I64, choice: tuple[Sampler, int, Bucket]
) -> SteadyRows | None:
    """What the step after `rows` may repeat; None unless all running rows decode and sample in it."""
    slots = rows.slots
    if len(sampling) != len(slots) or rows.num_single != len(slots):
        return None
    return SteadyRows(slots, table.generation[slots], rows.ends, turns_left(table, slots), *choice)


def fill_steady(ring: PlanRing, table: RowTable, rows: ChosenRows, steady: SteadyRows) -> tuple[PlanBuffers, I32]:
    """As plan.fill_rows, for rows that came out of `steady.next`. -> (buffers, logit_rows [S])."""
    buffers = ring.next()
    slots, count = rows.slots, len(rows.slots)
    buffers.slots[:count] = slots
    buffers.generation[:count] = steady.generation
    buffers.num_computed[:count] = rows.computed
    buffers.num_new[:count] = 1
    buffers.num_logits[:count] = 1
    buffers.token_ids[:count] = LAST_TOKEN
    buffers.positions[0, :count] = rows.computed
    logit_rows = buffers.logit_rows[:count]
    logit_rows[:] = ring.arange[:count]
    table.num_computed[slots] = rows.ends
    table.length[slots] = rows.ends + 1
    return buffers, logit_rows
