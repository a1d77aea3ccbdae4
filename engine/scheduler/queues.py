"""Who comes first: the waiting queue, and the running rows in the same order.

Every request has one order key for life, so two requests never change places: under fcfs its arrival number; under
priority (its arrival step + priority x aging_steps, arrival). A class is thus worth a bounded head start: a request of
a low class cannot be overtaken for ever (S-5). A preempted request keeps its key: it is at the head of its class.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from engine.kv.prefix_cache import UnitChain
from engine.request import Request
from engine.step import I64, Logprobs

OrderKey = tuple[int, int]  # smaller runs first; the second part is the arrival number, which is unique


@dataclass(slots=True, eq=False)
class Entry:
    """A request on its way through the scheduler."""

    request: Request
    order: OrderKey
    max_total: int  # prompt and output tokens at which it ends by length
    unit_keys: UnitChain | None = None  # keys of its whole known units, made at the first try
    epoch: int = -1  # of unit_keys
    waits_for: bytes | None = None  # a key that a running request is computing
    slot: int = -1  # >= 0 while running
    prompt_logprobs_sent: bool = False
    num_failures: int = 0  # failed steps that named no culprit
    num_cached: int = -1  # prompt tokens found in the prefix cache at its first admission, -1 = not yet admitted
    prompt_scores: list[Logprobs] = field(default_factory=list)  # collected so far in this tenancy


class WaitingQueue:
    """A heap by order key. Removal is lazy: the entry is forgotten, its place swept when half of the heap is dead."""

    def __init__(self) -> None:
        self._heap: list[tuple[OrderKey, Entry]] = []
        self._live: dict[int, Entry] = {}  # request key -> entry

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, key: int) -> bool:
        return key in self._live

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._live.values())

    def push(self, entry: Entry) -> None:
        self._live[entry.request.key] = entry
        heapq.heappush(self._heap, (entry.order, entry))

    def peek(self) -> Entry | None:
        while self._heap:
            entry = self._heap[0][1]
            if self._live.get(entry.request.key) is entry:
                return entry
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Entry:
        """The first entry; `peek` must have returned it."""
        entry = heapq.heappop(self._heap)[1]
        del self._live[entry.request.key]
        return entry

    def remove(self, key: int) -> Entry | None:
        entry = self._live.pop(key, None)
        if entry is not None and len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [pair for pair in self._heap if self._live.get(pair[1].request.key) is pair[1]]
            heapq.heapify(self._heap)
        return entry


class RunningOrder:
    """Slots of the running rows, the first in order first."""

    def __init__(self, max_rows: int) -> None:
        self._keys: list[tuple[OrderKey, int]] = []  # (order, slot), ascending
        self._slots = np.zeros(max_rows, np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def slots(self) -> I64:
        """i64 [n]; a view that the next add or remove writes to. numpy indexes by i64 three times as fast as by i32."""
        return self._slots[: len(self._keys)]

    def add(self, order: OrderKey, slot: int) -> None:
        count = len(self._keys)
        at = bisect_left(self._keys, (order, slot))
        insort(self._keys, (order, slot))
        self._slots[at + 1 : count + 1] = self._slots[at:count]
        self._slots[at] = slot

    def remove(self, order: OrderKey, slot: int) -> None:
        count = len(self._keys)
        at = bisect_left(self._keys, (order, slot))
        del self._keys[at]
        self._slots[at : count - 1] = self._slots[at + 1 : count]
