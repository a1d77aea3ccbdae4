"""Who runs when: order, fairness, preemption, the prefix that is waited for, aborts, failures. Over the fake runner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.core.messages import Ping, ResetPrefixCache
from engine.errors import StepFailed
from engine.params import SamplingParams
from engine.scheduler.update import ROW_ERRORS
from engine.step import RowError, Sampler
from tests.engine.scheduler.harness import Core, Sizes, alone, prompt_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def run_order(core: Core) -> list[int]:
    """Keys in the order in which they began."""
    order: list[int] = []
    while core.loop.has_work:
        core.step()
        for key in core.scheduler.state.running_keys():
            if key not in order:
                order.append(key)
    return order


def test_first_come_first_served() -> None:
    """S-4: a small request does not overtake a large one that waits for pages."""
    core = Core(Sizes(num_pages=(12,), max_num_seqs=4))
    keys = [core.add(prompt_of(length, i), GREEDY) for i, length in enumerate([100, 90, 20, 100, 5])]
    assert run_order(core) == keys


def test_lower_numbers_run_first_with_priority() -> None:
    core = Core(Sizes(max_num_seqs=1, extra={"policy": "priority"}))
    keys = [core.add(prompt_of(20, i), GREEDY, priority=priority) for i, priority in enumerate([5, 0, -1, 0])]
    assert run_order(core) == [keys[2], keys[1], keys[3], keys[0]]


def test_nobody_waits_for_ever_behind_a_higher_class() -> None:
    """S-5: one class is worth `aging_steps` steps; later arrivals of a higher class stop overtaking."""
    core = Core(Sizes(max_num_seqs=1, extra={"policy": "priority", "aging_steps": 10}))
    core.add(prompt_of(20, 1), GREEDY, priority=0)
    low = core.add(prompt_of(20, 2), GREEDY, priority=5)
    overtaken = 0
    for i in range(100):
        core.add(prompt_of(20, 3 + i), GREEDY, priority=0)
        for _ in range(13):
            core.step()
        overtaken += 1
        if core.answers[low].ended:
            break
    assert 2 <= overtaken <= 8


def test_a_long_prompt_does_not_hold_up_decoding_rows() -> None:
    """A prompt takes what the decoding rows leave of the budget."""
    core = Core(Sizes(max_num_batched_tokens=16))
    first = core.add(prompt_of(10), GREEDY)
    core.step()
    core.step()
    core.add(prompt_of(200, 1), GREEDY)
    before = len(core.answers[first].tokens)
    for _ in range(6):
        core.step()
    assert len(core.answers[first].tokens) == before + 6


def test_a_prompt_takes_no_more_than_its_threshold() -> None:
    core = Core(Sizes(extra={"long_prefill_token_threshold": 10}))
    core.add(prompt_of(45), GREEDY)
    sizes = []
    while core.loop.has_work:
        core.step()
        if core.scheduler.in_flight:
            sizes.append(int(core.scheduler.in_flight[-1].plan.num_new.max()))
    assert sizes[:5] == [10, 10, 10, 10, 5]


def test_a_prefix_that_is_being_computed_is_waited_for() -> None:
    """Nobody computes a unit twice at the same time; who waits is passed by, not in the way."""
    core = Core(Sizes(extra={"long_prefill_token_threshold": 16}))
    first = core.add(prompt_of(100), GREEDY)
    second = core.add(prompt_of(100), GREEDY)
    third = core.add(prompt_of(20, 9), GREEDY)
    order = run_order(core)
    assert order == [first, third, second]
    assert core.answers[second].num_cached == 96
    assert core.answers[first].tokens == core.answers[second].tokens


def test_who_waits_for_a_prefix_begins_when_its_maker_goes() -> None:
    core = Core(Sizes(max_num_batched_tokens=16))
    first = core.add(prompt_of(100), GREEDY)
    second = core.add(prompt_of(100), GREEDY)
    core.step()
    core.step()
    core.abort(first)
    core.run()
    assert core.answers[second].tokens == alone(prompt_of(100), GREEDY).tokens
    assert core.answers[second].num_cached in (16, 32)


def test_a_partial_tail_is_shared_by_copy() -> None:
    core = Core(Sizes(page_tokens=64))
    core.add(prompt_of(100), GREEDY)
    core.run()
    key = core.add([*prompt_of(90)[:80], 9, 9, 9], GREEDY)
    core.step()
    copies = core.scheduler.in_flight[-1].plan.copies
    assert copies is not None and copies.tokens.tolist() == [16]
    assert core.scheduler.state.kv.held_sources
    core.run()
    assert not core.scheduler.state.kv.held_sources
    assert core.answers[key].num_cached == 80
    assert core.answers[key].tokens == alone([*prompt_of(90)[:80], 9, 9, 9], GREEDY).tokens


def test_a_window_gives_its_pages_back() -> None:
    core = Core(Sizes(windows=(20,), pools=(0,), extra={"enable_prefix_caching": False}))
    core.add(prompt_of(200), replace(GREEDY, max_tokens=40))
    held = []
    while core.loop.has_work:
        core.step()
        pool = core.scheduler.state.kv.pools[0]
        held.append(pool.num_pages - 1 - pool.num_free)
    assert max(held) <= 6 and max(held[10:]) <= 3  # 64 tokens a step at first, then a window of 20


def test_preemption_takes_the_last_and_keeps_its_tokens() -> None:
    """S-6, S-8."""
    core = Core(Sizes(num_pages=(9,), max_num_seqs=4))
    params = replace(GREEDY, max_tokens=50)
    keys = [core.add(prompt_of(20, i), params) for i in range(3)]
    finished = []
    while core.loop.has_work:
        core.step()
        core.scheduler.check_integrity()
        finished += [key for key in keys if core.answers[key].ended and key not in finished]
    assert core.scheduler.stats().num_preemptions > 0
    assert finished[0] == keys[0]
    for i, key in enumerate(keys):
        assert core.answers[key].tokens == alone(prompt_of(20, i), params).tokens


@pytest.mark.parametrize("most", [0, 1, 8])
def test_who_was_preempted_too_often_reserves_what_it_needs(most: int) -> None:
    core = Core(Sizes(num_pages=(9,), max_num_seqs=8, extra={"max_preemptions": most}))
    params = replace(GREEDY, max_tokens=60)
    keys = [core.add(prompt_of(12, i), params) for i in range(8)]
    core.run()
    assert all(len(core.answers[key].tokens) == 60 for key in keys)
    assert core.scheduler.stats().num_preemptions <= len(keys) * (most + 2)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5])
def test_an_abort_is_legal_in_any_state(turns: int) -> None:
    core = Core(Sizes(max_num_batched_tokens=32))
    keys = [core.add(prompt_of(60, i), GREEDY) for i in range(10)]
    for _ in range(turns):
        core.step()
    core.abort(*keys[::2], 12345)
    core.abort(*keys[::2])
    core.run()
    for i, key in enumerate(keys):
        if i % 2:
            assert core.answers[key].tokens == alone(prompt_of(60, i), GREEDY).tokens
    assert core.scheduler.stats().kv_usage == 0


def test_an_aborted_request_frees_its_pages_at_once() -> None:
    core = Core()
    key = core.add(prompt_of(100), GREEDY)
    core.step()
    core.abort(key)
    assert core.scheduler.stats().kv_usage == 0


def test_a_row_error_ends_its_own_request() -> None:
    """R1, R3."""
    core = Core(non_finite_at={3: (1,)})
    keys = [core.add(prompt_of(20, i), GREEDY) for i in range(3)]
    core.run()
    errors = [core.answers[key].error for key in keys]
    assert sorted(error or "" for error in errors) == ["", "", "device_error"]
    for i, key in enumerate(keys):
        if core.answers[key].error is None:
            assert core.answers[key].tokens == alone(prompt_of(20, i), GREEDY).tokens


@pytest.mark.parametrize("cache_lost", [False, True])
@pytest.mark.parametrize("step_id", [1, 2, 6])
def test_a_failed_step_ends_its_culprit_alone(cache_lost: bool, step_id: int) -> None:
    failure = StepFailed("injected", rows=(0,), cache_lost=cache_lost)
    core = Core(fail_at={step_id: failure})
    keys = [core.add(prompt_of(30, i), GREEDY) for i in range(4)]
    core.run()
    assert sum(core.answers[key].error == "step_failed" for key in keys) == 1
    for i, key in enumerate(keys):
        if core.answers[key].error is None:
            assert core.answers[key].tokens == alone(prompt_of(30, i), GREEDY).tokens


def test_a_failure_without_a_culprit_is_survived_once() -> None:
    failures = {2: StepFailed("injected")}
    core = Core(fail_at=failures)
    key = core.add(prompt_of(30), GREEDY)
    core.run()
    assert core.answers[key].tokens == alone(prompt_of(30), GREEDY).tokens
    again = Core(fail_at={i: StepFailed("injected") for i in range(1, 99)})
    key = again.add(prompt_of(30), GREEDY)
    again.run()
    assert again.answers[key].error == "step_failed"


def test_keys_of_a_failed_step_are_withdrawn() -> None:
    """P-7: the units of the failed step are not hit by anybody, and nobody keeps what hit them."""
    core = Core(Sizes(max_num_batched_tokens=64), fail_at={1: StepFailed("injected")})
    first = core.add(prompt_of(60), GREEDY)
    second = core.add(prompt_of(60), GREEDY)  # hits the first one's units in step 2, which is in flight by then
    core.run()
    for key in (first, second):
        assert core.answers[key].tokens == alone(prompt_of(60), GREEDY).tokens


def test_resetting_the_cache_disturbs_nobody() -> None:
    core = Core()
    key = core.add(prompt_of(60), GREEDY)
    for _ in range(4):
        core.step()
    core.loop.handle(ResetPrefixCache(7))
    core.loop.handle(Ping(8))
    core.run()
    assert core.replies == [7, 8]
    assert core.answers[key].tokens == alone(prompt_of(60), GREEDY).tokens
    later = core.add(prompt_of(60), GREEDY)
    core.run()
    assert core.answers[later].num_cached == 0


def trace(core: Core) -> list[tuple[object, ...]]:
    rng = np.random.default_rng(3)
    log: list[tuple[object, ...]] = []
    for i in range(60):
        if i < 40:
            core.add(prompt_of(int(rng.integers(1, 120)), i % 7), replace(GREEDY, seed=i, temperature=1.0))
        if i % 9 == 5:
            core.abort(int(rng.integers(1, i + 1)))
        core.step()
        if core.scheduler.in_flight:
            plan = core.scheduler.in_flight[-1].plan
            log.append((plan.slots.tolist(), plan.num_new.tolist(), [d.pages.tolist() for d in plan.page_deltas if d]))
    return log


def test_the_same_trace_gives_the_same_plans() -> None:
    """S-13."""
    assert trace(Core(Sizes(num_pages=(20,)))) == trace(Core(Sizes(num_pages=(20,))))


def test_a_row_that_will_end_by_length_gets_no_further_turn() -> None:
    core = Core()
    core.add(prompt_of(10), replace(GREEDY, max_tokens=3))
    core.run()
    assert core.scheduler.stats().step == 3


def test_the_sampler_is_no_stronger_than_its_rows_need() -> None:
    core = Core(Sizes(max_num_batched_tokens=16))
    core.add(prompt_of(40), GREEDY)
    core.step()
    assert core.scheduler.in_flight[-1].plan.sampler is Sampler.NONE
    core.step()
    core.step()
    assert core.scheduler.in_flight[-1].plan.sampler is Sampler.GREEDY
    core.add(prompt_of(5, 1), replace(GREEDY, temperature=1.0, seed=1))
    core.step()
    assert core.scheduler.in_flight[-1].plan.sampler is Sampler.FULL


def test_plans_are_taken_from_a_ring() -> None:
    """Scribbling over a plan after its collect disturbs nothing; the fake runner checks that nobody does before."""
    core = Core()
    keys = [core.add(prompt_of(20, i), GREEDY) for i in range(4)]
    while core.loop.has_work:
        plans = [flight.plan for flight in core.scheduler.in_flight]
        core.step()
        for plan in plans:
            if all(flight.plan is not plan for flight in core.scheduler.in_flight):
                for name in ("slots", "generation", "num_computed", "num_new", "token_ids", "positions", "logit_rows"):
                    getattr(plan, name)[...] = -77
    for i, key in enumerate(keys):
        assert core.answers[key].tokens == alone(prompt_of(20, i), GREEDY).tokens


def test_no_row_error_is_unknown() -> None:
    assert set(ROW_ERRORS) == set(RowError) - {RowError.NONE}


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.7, "seed": 2, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
        {"temperature": 0.0, "min_tokens": 15, "ignore_eos": False},
        {"temperature": 0.0, "bad_words": ["x"], "presence_penalty": 1.0},
    ],
)
def test_a_preempted_request_goes_on_as_if_nothing_had_happened(params: dict[str, object]) -> None:
    """S-8: seeds, penalties, history, min_tokens and max_tokens count from the request's first token."""
    wanted = replace(GREEDY, max_tokens=30, **params)  # type: ignore[arg-type]
    core = Core()
    core.add(prompt_of(20, 1), replace(GREEDY, max_tokens=40))
    key = core.add(prompt_of(20), wanted)
    for turns in (6, 3, 9):
        for _ in range(turns):
            core.step()
        if key in core.scheduler.state.slot_of:
            core.scheduler.state.preempt(core.scheduler.state.slot_of[key])
    core.run()
    expected = alone(prompt_of(20), wanted)
    assert core.answers[key].tokens == expected.tokens
    assert core.answers[key].finish == expected.finish
