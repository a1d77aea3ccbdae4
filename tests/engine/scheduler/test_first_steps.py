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


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_a_client_that_leaves_frees_its_pages_within_two_steps(depth: int, steps: int) -> None:
    """Aborted before it begins, in its prompt, and while it generates; a neighbour keeps the engine busy."""
    core = Core(Sizes(max_in_flight=depth))
    stays = core.add(prompt_of(20, 1), SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
    for _ in range(3):
        core.step()
    leaves = core.add(prompt_of(100), SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
    for _ in range(steps):
        core.step()

    def others() -> float:
        """Usage beyond the pages that the one that stays can have."""
        pages = -(-(20 + len(core.answers[stays].tokens) + depth) // core.layout.groups[0].page_tokens)
        return core.scheduler.stats().kv_usage - pages / (core.layout.pools[0].num_pages - 1)

    if steps == 8:
        assert others() > 0
    core.abort(leaves)
    for _ in range(2):
        core.step()
    assert core.scheduler.stats().num_running + core.scheduler.stats().num_waiting == 1
    assert others() <= 1e-6
