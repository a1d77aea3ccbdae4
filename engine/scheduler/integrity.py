"""What must hold between any two calls of the scheduler, as far as its state shows it. Raises InternalError.

Called after a failed step, and by the tests after every rule.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.errors import check
from engine.kv.manager import KVManager
from engine.request import RequestStatus
from engine.scheduler.queues import RunningOrder, WaitingQueue
from engine.scheduler.table import RowTable


def check_state(table: RowTable, running: RunningOrder, waiting: WaitingQueue, slot_of: Mapping[int, int]) -> None:
    """S-1, S-2, S-11: a request is in one place, counts add up, lengths are in their limits."""
    slots = running.slots.tolist()
    check(len(set(slots)) == len(slots) == len(slot_of), "running rows and their keys differ in number")
    check(len(slots) + table.num_free_slots == len(table.entries), "slots are lost")
    orders = []
    for slot in slots:
        entry = table.entry(slot)
        check(entry.slot == slot and slot_of.get(entry.request.key) == slot, f"slot {slot}: its request is elsewhere")
        check(entry.request.key not in waiting, f"request {entry.request.key} runs and waits")
        check(entry.request.status is RequestStatus.RUNNING, f"request {entry.request.key} runs with another status")
        orders.append(entry.order)
    check(orders == sorted(orders), "running rows are out of order")
    for entry in waiting:
        check(entry.slot == -1 and entry.request.status is RequestStatus.WAITING, "a waiting request is not waiting")
    free = np.ones(len(table.entries), np.bool_)
    free[slots] = False
    check(not (table.length[free].any() or table.num_computed[free].any()), "a free slot holds tokens")
    check((table.collected <= table.num_computed).all(), "collected <= num_computed")
    check((table.num_computed <= table.length).all(), "num_computed <= length")
    check((table.num_tokens <= table.length).all(), "num_tokens <= length")
    held = np.flatnonzero(~free)
    check((table.length[held] <= table.max_total[held]).all(), "length <= max_total")
    wanted = np.zeros_like(table.stop_refs)
    for slot in slots:
        wanted[list(table.stop_sets[slot])] += 1
    check((wanted == table.stop_refs).all(), "stop ids are counted wrongly")
    check(table.num_prompt_scorers == int(table.scores_prompt.sum()), "rows with prompt logprobs are counted wrongly")


def check_writers(kv: KVManager, table: RowTable, running: RunningOrder) -> None:
    """P-5, P-6: computed <= allocated; a page that a row still writes to is in no other row's table."""
    for pages in kv.tables:
        named = np.bincount(pages.pages.ravel(), minlength=kv.pools[pages.pool_id].num_pages)
        for slot in running.slots.tolist():
            computed = int(table.num_computed[slot])
            check(computed <= int(pages.capacity[slot]), f"slot {slot}: computed beyond its pages")
            begin = max(computed // pages.page_tokens, int(pages.first_column[slot]))
            writable = pages.pages[slot, begin : int(pages.num_columns[slot])]
            check((named[writable] == 1).all(), f"slot {slot} writes to a page that others read")
