"""The fence model holds with every rule on, fails with any rule off, and its traces replay on the manager (A11)."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.kv.manager import KVManager
from tests.engine.kv.fence_model import INITIAL, PAGES, REQUESTS, Action, Rules, State, explore, pinned, successors
from tests.engine.kv.layouts import small_layout


@pytest.mark.parametrize("fence", ["order", "strict"])
def test_every_rule_on_holds(fence: str) -> None:
    found = explore(Rules(fence=fence))
    assert found.num_states > 1000
    assert found.violation is None, found
    assert found.num_wedged == 0


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Rules(fence="off"), "the device writes a page that a transfer fills"),
        (Rules(stale_guard=False), "the engine died of a stale event"),
        (Rules(dedup=False), "double free"),
    ],
)
def test_a_rule_off_is_missed(rules: Rules, expected: str) -> None:
    found = explore(rules)
    assert found.violation == expected
    assert len(found.trace) >= 3


def test_without_a_deadline_pages_never_come_back() -> None:
    found = explore(Rules(deadline=False))
    assert found.violation is None
    assert found.num_wedged > 0


class Replay:
    """The model's actions on a KVManager with pages of one token. A transfer is one more hold on its page, as an
    in-flight copy is. `page_of` names the real page of each model page that is in use."""

    def __init__(self) -> None:
        layout = small_layout((None,), (0,), PAGES + 1, 1, 1)
        self.kv = KVManager(layout, REQUESTS, 4, 1)
        self.pool = self.kv.pools[0]
        self.page_of: dict[int, int] = {}
        self.extra: dict[int, list[int]] = {i: [] for i in range(REQUESTS)}  # holds beside the table's
        self.transfers: dict[int, int] = {}

    def apply(self, action: Action, before: State, after: State) -> None:
        name, i = action
        if name in ("admit", "admit_remote", "grow_step"):
            new = after.rows[i].pages[-1]
            slots = np.array([i], np.int32)
            count = int(self.kv.tables[0].num_columns[i])
            assert self.kv.grow(slots, np.array([count + 1], np.int32))
            self.page_of[new] = int(self.kv.tables[0].pages[i, count])
            if name == "admit_remote":
                self.hold(self.page_of[new])
                self.transfers[i] = self.page_of[new]
        elif name == "relist":
            page = self.page_of[before.rows[i].pages[0]]
            self.hold(page)
            self.extra[i].append(page)
        elif name in ("xfer_done", "deadline"):
            self.release([self.transfers.pop(i)])
        elif name == "reclaim":
            table = self.kv.tables[0]
            pages = table.pages[i, : table.num_columns[i]].tolist() + self.extra[i]
            # one list with repeats, as a window group would give it: the page returns once
            self.release(pages)
            self.extra[i] = []
            table.pages[i] = 0
            table.num_columns[i] = table.capacity[i] = 0
            for page in before.rows[i].pages:
                self.page_of.pop(page, None)

    def hold(self, page: int) -> None:
        self.pool.share(np.array([page], np.int32))

    def release(self, pages: list[int]) -> None:
        self.pool.release(np.array(pages, np.int32))

    def check(self, state: State) -> None:
        self.pool.check_integrity()
        assert self.pool.num_free == len(state.free)
        held = set(np.flatnonzero(self.pool.refs).tolist())
        assert held == {self.page_of[page] for row in state.rows for page in row.pages}
        for i, row in enumerate(state.rows):
            table = self.kv.tables[0].pages[i]
            assert {int(page) for page in table if page} == {self.page_of[page] for page in row.pages}


def test_traces_replay_on_the_manager() -> None:
    rng = random.Random(0)
    rules = Rules()
    reused_in_flight = 0
    for _ in range(1000):
        state, replay = INITIAL, Replay()
        for _ in range(60):
            choices = list(successors(state, rules))
            if not choices:
                break
            action, after = rng.choice(choices)
            replay.apply(action, state, after)
            replay.check(after)
            if action[0] in ("admit", "grow_step"):
                reused_in_flight += after.rows[action[1]].pages[-1] in pinned(state)
            state = after
    assert reused_in_flight > 10, "no trace gave a freed page to a later step while an earlier one was in flight"
