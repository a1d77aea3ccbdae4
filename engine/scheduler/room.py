"""Room: may the first waiting request begin now? Pure questions; the scheduler acts on the answers.

A request begins when a slot is free, when the next unit it lacks is not being computed by a row in front of it (that
row is waited for instead), and when the pages of all its known tokens are there beside what running prompts will still
ask for: so what begins is not preempted at once. A request that was preempted too often needs all the pages it may ever
hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.kv.manager import Hit
from engine.scheduler.queues import Entry
from engine.scheduler.state import State
from engine.scheduler.table import wants_prompt_scores


@dataclass(frozen=True, slots=True)
class Opening:
    """A waiting request that may begin now, and the prefix it finds."""

    entry: Entry
    hit: Hit | None


class Room:
    def __init__(self, state: State) -> None:
        self._state = state
        self._blocked: tuple[Entry, list[int]] | None = None  # the head that did not fit, and the free pages then

    def reads_cache(self, entry: Entry) -> bool:
        """Requests that want logprobs of their prompt compute all of it."""
        if not self._state.prefix.caches(entry) or wants_prompt_scores(entry):
            return False
        return not entry.request.params.skip_reading_prefix_cache

    def scores(self, entry: Entry) -> bool:
        """Whether it draws on the budget of prompt positions to score."""
        return wants_prompt_scores(entry)

    def max_hit_units(self, entry: Entry) -> int:
        """The last token is always computed: its logits are wanted."""
        known = entry.request.num_prompt + len(entry.request.outputs)
        return (known - 1) // self._state.kv.unit_tokens

    def waits_for_prefix(self, entry: Entry) -> bool:
        """Whether the next unit this request lacks is being computed by a row in front of it."""
        computing = self._state.prefix.computing
        if not computing or not self.reads_cache(entry):
            return False
        if entry.waits_for is None or entry.waits_for not in computing:
            entry.waits_for = None
            keys = self._state.prefix.keys(entry)
            most = self.max_hit_units(entry)
            hit = self._state.kv.find(keys, most) if most and keys[0] not in computing else None
            found = 0 if hit is None else hit.num_units
            if found < most and keys[found] in computing:
                entry.waits_for = keys[found]
        if entry.waits_for is None:
            return False
        return self._state.table.entry(computing[entry.waits_for]).order < entry.order

    def find(self, entry: Entry) -> Opening | None:
        """Look up the prefix cache and count pages; None when the request must wait."""
        state = self._state
        free = state.kv.num_free()
        if self._blocked is not None:
            blocked, then = self._blocked
            if blocked is entry and len(state.running) and all(a <= b for a, b in zip(free, then, strict=True)):
                return None
        self._blocked = None
        request = entry.request
        protected = request.num_preemptions >= state.config.max_preemptions
        target = entry.max_total if protected else request.num_prompt + len(request.outputs)
        hit = None
        if self.reads_cache(entry):
            keys, most = state.prefix.keys(entry), self.max_hit_units(entry)
            hit = state.kv.find(keys, most)
            if hit is not None and any(g.partial for g in hit.groups) and not self._fits(hit, target):
                # a partial copy holds one page more than the row itself will
                hit = state.kv.find(keys, most, partial=False)
        if not self._fits(hit, target):
            self._blocked = (entry, free)
            return None
        return Opening(entry, hit)

    def _reserved(self) -> list[int]:
        """Pages a pool that running rows will still ask for; only those in `reserving` can."""
        state = self._state
        state.reserving = [
            slot for slot in state.reserving if not state.kv.holds(slot, state.table.reserve_to.item(slot))
        ]
        if not state.reserving:
            return [0] * len(state.kv.pools)
        slots = np.array(state.reserving, np.int64)
        return state.kv.reserved(slots, state.table.reserve_to[slots])

    def _fits(self, hit: Hit | None, num_tokens: int) -> bool:
        state = self._state
        need = state.kv.admission_need(hit, num_tokens)
        if len(state.running):
            reserved = self._reserved()
            for i, pool in enumerate(state.kv.pools):
                # running rows are about to grow: leave some room, or what begins now is preempted at once
                need[i] += reserved[i] + min(len(state.running), pool.num_pages // 64)
        return state.kv.fits(need)
