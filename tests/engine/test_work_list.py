"""engine.step.work_list: every (query, key) pair that attention needs is in one item, and no item is too big."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InternalError
from engine.step import Bucket, StepPlan, WorkList, empty_plan, work_list

ROWS = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), max_size=6)  # (num_computed, num_new)
PAGE = 4


def plan_of(rows: list[tuple[int, int]], num_steps: int = 1) -> StepPlan:
    computed, new = np.array(rows, np.int32).reshape(-1, 2).T
    total = int(new.sum())
    plan = empty_plan(0, Bucket(tokens=total, rows=len(rows)))
    return replace(
        plan,
        num_steps=num_steps,
        slots=np.arange(len(rows), dtype=np.int32),
        num_computed=computed.copy(),
        num_new=new.copy(),
        token_ids=np.zeros(total, np.int32),
    )


def items(work: WorkList) -> list[tuple[int, int, int, int, int, int]]:
    columns = (work.row, work.tile, work.query, work.num_queries, work.kv_begin, work.kv_end)
    return list(zip(*(c.tolist() for c in columns), strict=True))


@given(rows=ROWS, q_tile=st.integers(1, 9), pages=st.integers(1, 5), window=st.none() | st.integers(1, 30))
def test_every_pair_once(rows: list[tuple[int, int]], q_tile: int, pages: int, window: int | None) -> None:
    kv_tile = pages * PAGE
    work = work_list(plan_of(rows), q_tile, kv_tile, PAGE, window)
    seen: dict[tuple[int, int], int] = {}
    for row, _, query, count, begin, end in items(work):
        start = sum(n for _, n in rows[:row])
        assert start <= query and query + count <= start + rows[row][1]
        assert 1 <= count <= q_tile and 0 <= begin < end <= begin + kv_tile and begin % PAGE == 0
        for q in range(query, query + count):
            position = rows[row][0] + q - start
            low = 0 if window is None else max(0, position - window + 1)
            for key in range(max(low, begin), min(end, position + 1)):
                seen[q, key] = seen.get((q, key), 0) + 1
    wanted = set()
    token = 0
    for computed, new in rows:
        for position in range(computed, computed + new):
            low = 0 if window is None else max(0, position - window + 1)
            wanted |= {(token, key) for key in range(low, position + 1)}
            token += 1
    assert set(seen) == wanted and set(seen.values()) <= {1}


@given(rows=ROWS, q_tile=st.integers(1, 9), pages=st.integers(1, 5))
def test_order_and_economy(rows: list[tuple[int, int]], q_tile: int, pages: int) -> None:
    """Tiles in order, their items adjacent and ascending; a window never adds work; types are int32."""
    plan = plan_of(rows)
    work = work_list(plan, q_tile, pages * PAGE, PAGE)
    assert all(column.dtype == np.int32 for column in (work.row, work.tile, work.query, work.kv_begin, work.kv_end))
    assert items(work) == sorted(items(work), key=lambda item: (item[1], item[4]))
    assert sorted(set(work.tile.tolist())) == list(range(sum(-(-n // q_tile) for _, n in rows)))
    narrow = work_list(plan, q_tile, pages * PAGE, PAGE, window=8)
    length = narrow.kv_end - narrow.kv_begin
    assert narrow.num_items <= work.num_items and length.sum() <= (work.kv_end - work.kv_begin).sum()


@given(computed=st.integers(0, 90), behind=st.integers(0, 12), window=st.integers(1, 20))
def test_slack_keeps_the_true_window(computed: int, behind: int, window: int) -> None:
    """The device may be `behind` tokens behind the plan: its window is still inside the items."""
    true = max(0, computed - behind)
    work = work_list(plan_of([(computed, 1)]), 1, PAGE, PAGE, window, slack=behind)
    assert int(work.kv_begin.min()) <= max(0, true - window + 1)


def test_several_turns_see_their_own_tokens() -> None:
    work = work_list(plan_of([(6, 1)], num_steps=4), 1, 8, PAGE)
    assert items(work) == [(0, 0, 0, 1, 0, 8), (0, 0, 0, 1, 8, 10)]


def test_no_rows_no_work() -> None:
    assert work_list(plan_of([]), 16, 64, 16).num_items == 0


def test_bad_tiles_are_refused() -> None:
    with pytest.raises(InternalError, match="no multiple"):
        work_list(plan_of([(0, 1)]), 16, 40, 16)
