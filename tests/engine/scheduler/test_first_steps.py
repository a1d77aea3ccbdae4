"""The scheduler's plain behaviour, one idea a test, over the fake runner."""

from __future__ import annotations

import pytest

from engine.params import SamplingParams
from engine.request import FinishReason
from tests.engine.scheduler.harness import Core, Sizes, alone, prompt_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.mark.parametrize("depth", [1, 2])
def test_one_request_runs_to_its_length(depth: int) -> None:
    core = Core(Sizes(max_in_flight=depth))
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    key = core.add(prompt_of(100), params)
    core.run()
    assert len(core.answers[key].tokens) == 9
    assert core.answers[key].finish is FinishReason.LENGTH
    assert core.answers[key].tokens == alone(prompt_of(100), params).tokens
    assert core.scheduler.stats().kv_usage == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_neighbours_do_not_change_an_answer(depth: int) -> None:
    core = Core(Sizes(max_in_flight=depth))
    keys = [core.add(prompt_of(10 + 13 * i, i), GREEDY) for i in range(12)]
    core.run()
    for i, key in enumerate(keys):
        assert core.answers[key].tokens == alone(prompt_of(10 + 13 * i, i), GREEDY).tokens


@pytest.mark.parametrize("page", [16, 64])
def test_a_prefix_is_found(page: int) -> None:
    core = Core(Sizes(page_tokens=page))
    first = core.add(prompt_of(100), GREEDY)
    core.run()
    second = core.add(prompt_of(100), GREEDY)
    core.run()
    assert core.answers[first].num_cached == 0
    assert core.answers[second].num_cached == 96
    assert core.answers[first].tokens == core.answers[second].tokens


def test_pages_run_out_and_everybody_finishes() -> None:
    core = Core(Sizes(num_pages=(14,)))
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    keys = [core.add(prompt_of(20, i), params) for i in range(8)]
    core.run()
    assert core.scheduler.stats().num_preemptions > 0
    for i, key in enumerate(keys):
        assert core.answers[key].tokens == alone(prompt_of(20, i), params).tokens
