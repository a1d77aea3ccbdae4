"""State: where every request is, and the moves between those places. The scheduler decides, this carries out.

    waiting --open--> running (a slot, rows of the tables, pages) --leave--> finished, or back to waiting

Always true: a request is in exactly one place; whatever it holds is released by `leave`, the only way out of a slot.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.errors import InvalidValue, Overloaded, check
from engine.kv.manager import Hit, KVManager
from engine.request import Request, RequestStatus
from engine.scheduler.admission import admit_check
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.integrity import check_state, check_writers
from engine.scheduler.prefix import PrefixKeys
from engine.scheduler.queues import Entry, RunningOrder, WaitingQueue
from engine.scheduler.stats import Counters, SchedulerGauges
from engine.scheduler.table import RowTable
from engine.specs.cache import CacheLayout


class State:
    def __init__(self, config: SchedulerConfig, layout: CacheLayout) -> None:
        self.config = config
        self.kv = KVManager(layout, config.max_num_seqs, config.max_model_len, config.max_span)
        self.table = RowTable(config, layout.unit_tokens)
        self.prefix = PrefixKeys(self.table, self.kv, config.enable_prefix_caching)
        self.waiting = WaitingQueue()
        self.running = RunningOrder(config.max_num_seqs)
        self.slot_of: dict[int, int] = {}  # request key -> slot, of running requests
        self.left: list[int] = []  # slots whose tenancy ended since the last plan; the plan builder empties it
        self.reserving: list[int] = []  # slots that may lack pages which others must leave to them (table.reserve_to)
        self.counters = Counters()
        self.capacity = self.kv.capacity_tokens(config.max_model_len)  # tokens of one request alone

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidValue, NeverFits or Overloaded; then nothing has changed."""
        admit_check(request, self.config, self.capacity)
        if request.key in self.waiting or request.key in self.slot_of:
            raise InvalidValue(f"key: {request.key} is in use", param="key")
        if len(self.waiting) >= self.config.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests are waiting; the limit is {self.config.max_waiting}")
        self.counters.arrivals += 1
        request.arrival = self.counters.arrivals
        rank = 0
        if self.config.policy == "priority":
            rank = self.counters.steps + request.priority * self.config.aging_steps
        limit = min(self.config.max_model_len, self.capacity)
        wanted = request.params.max_tokens
        max_total = limit if wanted is None else min(request.num_prompt + wanted, limit)
        self.wait(Entry(request, (rank, request.arrival), max_total))

    def wait(self, entry: Entry) -> None:
        """Into the queue, in front of all that arrived later. Generated tokens are kept, the rest begins again."""
        entry.request.status = RequestStatus.WAITING
        entry.prompt_scores = []
        entry.unit_keys = None
        self.waiting.push(entry)

    def abort(self, keys: Iterable[int]) -> int:
        """End requests in any state, without output. -> how many of the keys were known."""
        known = 0
        for key in keys:
            entry = self.waiting.remove(key)
            slot = self.slot_of.get(key)
            if entry is not None:
                self.end(entry)
            elif slot is not None:
                self.finish(slot)
            known += entry is not None or slot is not None
        return known

    def open(self, entry: Entry, hit: Hit | None) -> int:
        """Begin to run a request that is no longer queued. -> its slot."""
        hit_units = 0 if hit is None else hit.num_units
        hit_tokens = hit_units * self.kv.unit_tokens
        counters, request = self.counters, entry.request
        if entry.num_cached < 0:
            counters.prefix_queries += request.num_prompt
            counters.prefix_hits += hit_tokens
        elif request.num_preemptions:
            counters.recomputed -= hit_tokens
        slot = self.table.open(entry, hit_tokens)
        self.kv.open_row(slot, hit)
        self.prefix.opened(slot, entry, hit_units)
        if request.num_preemptions >= self.config.max_preemptions:
            self.table.reserve_to[slot] = entry.max_total
        self.running.add(entry.order, slot)
        self.slot_of[request.key] = slot
        if slot not in self.reserving:
            self.reserving.append(slot)
        request.status = RequestStatus.RUNNING
        return slot

    def leave(self, slot: int, *, keep_keys: bool = True) -> Entry:
        """End the tenancy of a slot: key what it computed, release its pages."""
        self.prefix.closing(slot, keep=keep_keys)
        self.kv.close_row(slot)
        entry = self.table.close(slot)
        self.running.remove(entry.order, slot)
        del self.slot_of[entry.request.key]
        self.left.append(slot)
        return entry

    def finish(self, slot: int, *, keep_keys: bool = True) -> None:
        self.end(self.leave(slot, keep_keys=keep_keys))

    def end(self, entry: Entry) -> None:
        """The request is in no place any more."""
        entry.request.status = RequestStatus.FINISHED

    def preempt(self, slot: int) -> None:
        """Take the slot and pages from a request; it computes its tokens again later."""
        self.counters.preemptions += 1
        self.counters.recomputed += int(self.table.num_computed[slot])
        entry = self.leave(slot)
        entry.request.num_preemptions += 1
        self.wait(entry)

    def running_keys(self) -> list[int]:
        """Keys of the running requests, the first in order first."""
        keys: list[int] = self.table.key[self.running.slots].tolist()
        return keys

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

    def check_integrity(self) -> None:
        """Every invariant that can be told from the state. Raises InternalError."""
        check_state(self.table, self.running, self.waiting, self.slot_of)
        check_writers(self.kv, self.table, self.running)
        self.prefix.check_integrity()
        for slot in self.running.slots.tolist():
            held = self.kv.holds(slot, self.table.reserve_to.item(slot))
            check(held or slot in self.reserving, f"slot {slot}: nobody knows that pages are reserved for it")
        self.kv.check_integrity()
