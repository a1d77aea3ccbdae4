"""Replicas over the fake runner: every answer as if alone, shared fairly, failures kept to those they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from engine.core.messages import AddRequest, SchedulerStats, StepOutputs
from engine.core.replicas import HEAD_TOKENS
from engine.errors import StepFailed
from engine.params import SamplingParams
from engine.request import FinishReason
from engine.step import StepPlan
from tests.engine.scheduler.harness import Core, Sizes, alone, prompt_of

THREE = Sizes(num_replicas=3)


def sampled(i: int) -> SamplingParams:
    return SamplingParams(temperature=float(i % 2), seed=i, max_tokens=10 + i % 30, logprobs=1 if i % 4 == 0 else None)


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("pages", [65, 20])
@pytest.mark.parametrize("turns", [1, 8])
def test_answers_are_those_of_a_request_alone(
    max_in_flight: int, pages: int, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few pages rows are preempted in their replicas. The fake refuses turns beside what is no decode step."""
    extra: dict[str, object] = {"max_num_steps": turns}
    core = Core(Sizes(num_replicas=3, max_in_flight=max_in_flight, num_pages=(pages,), extra=extra))
    wanted = {}
    seen: list[Sequence[StepPlan]] = []
    submit = core.loop.executor.submit

    def watched(plans: Sequence[StepPlan]) -> object:
        seen.append(plans)
        return submit(plans)

    monkeypatch.setattr(core.loop.executor, "submit", watched)
    for i in range(40):
        prompt = prompt_of(1 + 7 * i % 90, seed=i)
        wanted[core.add(prompt, sampled(i))] = alone(prompt, sampled(i))
        if i % 8 == 0:
            core.step()
    while core.loop.has_work:
        core.step()
        core.loop.replicas.check_integrity()  # type: ignore[attr-defined]
    assert any(plan.num_steps > 1 for plans in seen for plan in plans) == (turns > 1)
    for key, answer in wanted.items():
        found = core.answers[key]
        assert (found.tokens, found.finish) == (answer.tokens, answer.finish)
        assert not answer.logprobs or found.logprobs == answer.logprobs  # columns come for all rows or none
    assert min(scheduler.stats().step for scheduler in core.schedulers) > 10
    assert core.loop.replicas.stats().num_preemptions > 0 or pages > 20  # type: ignore[attr-defined]


def test_an_idle_replica_gets_empty_plans() -> None:
    core = Core(THREE)
    prompt = prompt_of(20)
    key = core.add(prompt)
    core.run()
    assert core.answers[key].tokens == alone(prompt, SamplingParams(temperature=0.0, max_tokens=8)).tokens
    assert sorted(scheduler.stats().step > 0 for scheduler in core.schedulers) == [False, False, True]


def test_requests_are_shared_fairly() -> None:
    """No replica has more than one request more than another, whatever ended before."""
    core = Core(THREE)
    for i in range(60):
        core.add(prompt_of(10, seed=i), SamplingParams(temperature=0.0, max_tokens=1 + i % 5, ignore_eos=True))
        loads = [len(s.state.slot_of) + len(s.state.waiting) for s in core.schedulers]
        assert max(loads) - min(loads) <= 1
    core.run()
    for i in range(30):  # one at a time: all replicas have their turn
        core.add(prompt_of(10, seed=i))
        core.run()
    assert {s.state.counters.arrivals for s in core.schedulers} == {30}


def test_the_same_beginning_goes_to_the_same_replica() -> None:
    core = Core(THREE)
    head = prompt_of(HEAD_TOKENS, seed=9)
    for i in range(6):  # one after another: each finds what the first has computed
        key = core.add(head + prompt_of(5, seed=i))
        core.run()
        assert core.answers[key].num_cached == (0 if i == 0 else HEAD_TOKENS)
    arrivals = sorted(s.state.counters.arrivals for s in core.schedulers)
    assert arrivals == [0, 0, 6]
    for i in range(30):  # all at once: the others help
        core.add(head + prompt_of(5, seed=100 + i))
    loads = sorted(len(s.state.slot_of) + len(s.state.waiting) for s in core.schedulers)
    assert loads[0] >= 8 and sum(loads) == 30
    core.run()


def test_sequences_of_one_request_stay_together() -> None:
    core = Core(THREE)
    core.add(prompt_of(30), SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=4))
    assert sorted(len(s.state.waiting) for s in core.schedulers) == [0, 0, 4]
    core.run()
    assert all(answer.ended for answer in core.answers.values())


def test_aborted_requests_end_in_their_replicas() -> None:
    core = Core(THREE)
    keys = [core.add(prompt_of(12, seed=i), SamplingParams(temperature=0.0, max_tokens=50)) for i in range(12)]
    for _ in range(4):
        core.step()
    core.abort(*keys[::2])
    core.run()
    for key in keys[1::2]:
        assert core.answers[key].finish is not FinishReason.NONE
    gauges = core.loop.replicas.stats()  # type: ignore[attr-defined]
    assert (gauges.num_running, gauges.num_waiting, gauges.kv_usage) == (0, 0, 0.0)


def test_a_key_in_use_in_another_replica_is_refused() -> None:
    core = Core(THREE)
    first = core.add(prompt_of(12))
    core.loop.handle(
        AddRequest(key=first, prompt=np.array([9, 9], "<i4").tobytes(), params=SamplingParams(max_tokens=1),
                   stop_ids=[], eos_ids=[], bad_word_ids=[])
    )  # fmt: skip
    core.step()
    assert core.answers[first].error is not None


def test_figures_add_up() -> None:
    core = Core(THREE)
    told: list[SchedulerStats] = []
    hear = core.hear_step

    def listen(message: StepOutputs) -> None:
        assert message.stats is not None
        told.append(message.stats)
        hear(message)

    core.hear_step = listen  # type: ignore[method-assign]
    head = prompt_of(HEAD_TOKENS, seed=9)
    for i in range(20):
        core.add(head + prompt_of(1 + i, seed=i))
    for _ in range(3):
        core.step()
    running = sum(len(s.state.running) for s in core.schedulers)
    assert told[-1].num_running == running > 8  # more than one replica has slots for
    core.run()
    each = [s.stats() for s in core.schedulers]
    assert told[-1].prefix_queries == sum(one.prefix_queries for one in each) == 20 * HEAD_TOKENS + sum(range(1, 21))
    assert told[-1].prefix_hits == sum(one.prefix_hits for one in each) > 0
    assert max(one.step for one in each) <= told[-1].step <= sum(one.step for one in each)
    assert told[-1].num_running == told[-1].num_waiting == 0


@pytest.mark.parametrize("cache_lost", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_failed_step_ends_its_culprits_alone(named: bool, cache_lost: bool) -> None:
    """Rows are counted over all replicas: with two rows each, row 3 is the second of the second replica."""
    failure = StepFailed("broken", rows=(3,) if named else (), cache_lost=cache_lost)
    core = Core(THREE, fail_at={6: failure})
    prompts = {core.add(prompt_of(12, seed=i), params(i)): (prompt_of(12, seed=i), params(i)) for i in range(6)}
    culprit = -1
    for _ in range(5):
        core.step()
    running = [s.state.running_keys() for s in core.schedulers]
    assert [len(keys) for keys in running] == [2, 2, 2]
    culprit = running[1][1]
    core.run()
    for key, (prompt, how) in prompts.items():
        if named and key == culprit:
            assert core.answers[key].error == "step_failed"
        else:
            assert core.answers[key].tokens == alone(prompt, how).tokens, key


def params(i: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=i, max_tokens=12, ignore_eos=True)


def test_a_lost_cache_is_lost_for_an_idle_replica_too() -> None:
    """Its request waits for nothing and is not in the failed step: what it computed is gone all the same."""
    core = Core(Sizes(num_replicas=2), fail_at={4: StepFailed("gone", cache_lost=True)})
    prompt = prompt_of(80, seed=1)
    first = core.add(prompt)
    core.run()  # its keys are in the prefix cache of one replica
    other = core.add(prompt_of(20, seed=2), params(1))
    core.run()
    again = core.add(prompt)
    core.run()
    assert core.answers[again].tokens == core.answers[first].tokens
    assert core.answers[other].tokens == alone(prompt_of(20, seed=2), params(1)).tokens
