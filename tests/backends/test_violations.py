"""Plans and calls that break the contract: each must be an InternalError of the fake runner, not a wrong answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from backends.fake import Runner
from engine.errors import InternalError, StepFailed
from engine.step import (
    LAST_TOKEN,
    Bucket,
    OpenedRows,
    PageCopies,
    PageDelta,
    Sampler,
    StepPlan,
    empty_plan,
)
from tests.backends.driver import Driver, Seq


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def running() -> tuple[Driver, Seq, Seq]:
    d = Driver(Runner())
    a, b = d.new(d.prompt(18)), d.new(d.prompt(18))
    d.step([(a, 18), (b, 18)])
    return d, a, b


def point(slot: int, column: int, page: int) -> tuple[PageDelta, ...]:
    return (PageDelta(slots=i32(slot), columns=i32(column), pages=i32(page)),)


Damage = Callable[[StepPlan, Seq, Seq], StepPlan]

VIOLATIONS: dict[str, tuple[str, Damage]] = {
    "null page read": ("the null page", lambda p, a, b: replace(p, page_deltas=point(a.slot, 0, 0))),
    "unwritten page read": ("never written", lambda p, a, b: replace(p, page_deltas=point(a.slot, 0, spare(a, b)))),
    "foreign page read": ("continue", lambda p, a, b: replace(p, page_deltas=point(a.slot, 0, b.pages[0][0]))),
    "page at the wrong column": ("positions", lambda p, a, b: replace(p, page_deltas=point(a.slot, 0, a.pages[0][1]))),
    "page beyond the pool": ("not in", lambda p, a, b: replace(p, page_deltas=point(a.slot, 1, 64))),
    "column beyond the table": ("beyond the table", lambda p, a, b: replace(p, page_deltas=point(a.slot, 99, 5))),
    "slot not open": ("not open", lambda p, a, b: replace(p, slots=i32(free_slot(a, b), b.slot))),
    "generation": ("generation", lambda p, a, b: replace(p, generation=p.generation + 9)),
    "slot twice": ("two rows", lambda p, a, b: replace(p, slots=i32(a.slot, a.slot))),
    "num_computed too small": ("num_computed", lambda p, a, b: replace(p, num_computed=p.num_computed - 1)),
    "num_computed too large": ("num_computed", lambda p, a, b: replace(p, num_computed=p.num_computed + 1)),
    "positions": ("position", lambda p, a, b: replace(p, positions=p.positions + 1)),
    "bucket too small": ("bucket", lambda p, a, b: replace(p, bucket=Bucket(tokens=1, rows=8))),
    "unknown bucket": ("none of the buckets", lambda p, a, b: replace(p, bucket=Bucket(tokens=9, rows=8))),
    "logit rows": ("logit_rows", lambda p, a, b: replace(p, logit_rows=i32(0, 0))),
    "sampler none": ("sampler", lambda p, a, b: replace(p, sampler=Sampler.NONE)),
    "dtype": ("int64", lambda p, a, b: replace(p, num_new=p.num_new.astype(np.int64))),
    "old step id": ("after step", lambda p, a, b: replace(p, step_id=1)),
    "close twice": ("not open", lambda p, a, b: replace(p, closed=i32(free_slot(a, b)))),
    "copy of unwritten tokens": ("copy of 16", lambda p, a, b: copying(p, a.pages[0][1], spare(a, b), 16)),
    "copy onto the null page": ("not in", lambda p, a, b: copying(p, a.pages[0][0], 0, 4)),
    "copy over a page in use": ("written", lambda p, a, b: copying(p, a.pages[0][0], b.pages[0][0], 4)),
    "reopened without a new generation": ("already have", lambda p, a, b: reopened(p, a)),
}  # fmt: skip


def spare(a: Seq, b: Seq) -> int:
    """A page that nobody uses."""
    return max(set(range(1, 64)) - {*a.pages[0], *b.pages[0]})


def free_slot(a: Seq, b: Seq) -> int:
    return min({0, 1, 2} - {a.slot, b.slot})


def copying(plan: StepPlan, source: int, target: int, tokens: int) -> StepPlan:
    copies = PageCopies(pool=i32(0), source=i32(source), target=i32(target), tokens=i32(tokens))
    return replace(plan, copies=copies)


def reopened(plan: StepPlan, a: Seq) -> StepPlan:
    d = Driver(Runner())
    d.plan([(d.new([1]), 1)])
    donor = d.plan([(d.new([1, 2]), 2)]).opened
    assert donor is not None
    opened = OpenedRows(slots=i32(a.slot), generation=i32(a.generation), num_computed=i32(0), sampling=donor.sampling)
    return replace(plan, opened=opened)


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violation_is_loud(name: str) -> None:
    message, damage = VIOLATIONS[name]
    d, a, b = running()
    plan = damage(d.plan([(a, 1), (b, 1)]), a, b)
    with pytest.raises(InternalError, match=message):
        d.runner.collect(d.runner.submit([plan]))


def test_use_after_free_is_found_by_the_reader() -> None:
    """A page given to somebody else while a row still names it: the row's next read fails."""
    d, a, b = running()
    d.free_pages[0] = [a.pages[0][0]]
    thief = d.new(d.prompt(16))
    d.step([(thief, 16)])
    d.free_pages[0] = [50, 51]
    d.step([(b, 1)])
    with pytest.raises(InternalError, match="continue"):
        d.step([(a, 1)])


def test_two_rows_write_one_page() -> None:
    d = Driver(Runner())
    a, b = d.new(d.prompt(16)), d.new(d.prompt(16))
    d.step([(a, 16), (b, 16)])
    plan = d.plan([(a, 1), (b, 1)])  # both begin a new page
    delta = PageDelta(slots=i32(a.slot, b.slot), columns=i32(1, 1), pages=i32(spare(a, b), spare(a, b)))
    with pytest.raises(InternalError, match="two rows write page"):
        d.runner.submit([replace(plan, page_deltas=(delta,))])


def test_the_last_token_of_a_row_that_sampled_none() -> None:
    d = Driver(Runner())
    seq = d.new(d.prompt(8))
    d.step([(seq, 4)])
    plan = d.plan([(seq, 4)])
    with pytest.raises(InternalError, match="sampled none"):
        d.runner.submit([replace(plan, token_ids=i32(LAST_TOKEN, LAST_TOKEN, 1, 2))])


def test_greedy_plan_for_a_row_that_samples() -> None:
    d = Driver(Runner())
    seq = d.new(d.prompt(8), temperature=1.0)
    with pytest.raises(InternalError, match="full sampler"):
        d.submit(replace(d.plan([(seq, 8)]), sampler=Sampler.GREEDY))


def test_a_plan_that_changes_in_flight() -> None:
    d = Driver(Runner())
    seq = d.new(d.prompt(8))
    plan = d.plan([(seq, 8)])
    handle = d.submit(plan)
    plan.token_ids[3] += 1
    with pytest.raises(InternalError, match="changed before"):
        d.collect(handle)


def test_order_and_depth() -> None:
    d = Driver(Runner())
    seq = d.new(d.prompt(8))
    first, second = d.submit(d.plan([(seq, 8)])), d.submit(d.plan([(seq, 1)]))
    with pytest.raises(InternalError, match="in flight already"):
        d.submit(d.plan([(seq, 1)]))
    with pytest.raises(InternalError, match="collected before"):
        d.runner.collect(second)
    d.runner.collect(first)
    with pytest.raises(InternalError, match="not in flight"):
        d.runner.collect(first)


def test_life_in_order() -> None:
    runner = Runner()
    with pytest.raises(InternalError, match="expected configured"):
        runner.load(None)
    with pytest.raises(InternalError, match="submit to a runner"):
        runner.submit([empty_plan(0, Bucket(tokens=1, rows=1))])
    d = Driver(Runner(), warm=False)
    with pytest.raises(InternalError, match="allocated"):
        d.runner.submit([empty_plan(1, d.bucket(0, 0))])


def test_failed_steps_are_collected_before_the_next_submit() -> None:
    d = Driver(Runner(fail_at={2: StepFailed("injected")}))
    a, b = d.new(d.prompt(8)), d.new(d.prompt(8))
    d.step([(a, 8)])
    first, second = d.submit(d.plan([(a, 1)])), d.submit(d.plan([(a, 1)]))
    with pytest.raises(StepFailed):
        d.runner.collect(first)
    with pytest.raises(InternalError, match="collect those behind it"):
        d.submit(d.plan([(b, 8)]))
    b.opened = False  # that plan was refused
    with pytest.raises(StepFailed):
        d.runner.collect(second)
    d.in_flight.clear()
    assert d.step([(d.preempt(b), 8)]).num_sampled.tolist() == [1]
