"""Steps of several decode turns: when they are planned, what they change (nothing but the pace), and what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from engine.core.loop import CoreLoop
from engine.errors import ConfigError
from engine.executor.base import SameProcess
from engine.kv.prefix_cache import chain_keys
from engine.params import SamplingParams
from engine.runner import ModelRunner, StepHandle
from engine.step import StepPlan, StepResult
from tests.engine.scheduler.harness import Core, Sizes, alone, prompt_of

LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
KINDS = (
    LONG,
    replace(LONG, max_tokens=23, temperature=1.0, seed=3, logprobs=2),
    replace(LONG, ignore_eos=False, min_tokens=9, stop_token_ids=list(range(10, 16))),
    replace(LONG, repetition_penalty=1.3, max_tokens=41),
    replace(LONG, max_tokens=None),
)


class Noting(SameProcess):
    """Remembers how many turns each step had."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self.turns: list[int] = []

    def submit(self, plans: Sequence[StepPlan]) -> StepHandle:
        self.turns.append(plans[0].num_steps)
        return super().submit(plans)


def core_of(most: int, *, executor: type[Noting] = Noting, **sizes: object) -> Core:
    extra = {"max_num_steps": most, **sizes.pop("extra", {})}  # type: ignore[dict-item]
    core = Core(Sizes(extra=extra, **sizes))  # type: ignore[arg-type]
    core.loop = CoreLoop(core.scheduler, executor(core.runner), core.config.max_in_flight)
    return core


def turns_of(core: Core, steps: int) -> list[int]:
    """num_steps of the plans of so many turns of the loop."""
    executor = core.loop.executor
    assert isinstance(executor, Noting)
    before = len(executor.turns)
    for _ in range(steps):
        core.step()
        core.scheduler.check_integrity()
    return executor.turns[before:]


def test_more_and_more_turns_until_somebody_comes() -> None:
    """A prompt's step and the first decode step take one turn, the next twice as many as the last."""
    core = core_of(8)
    core.add(prompt_of(5), LONG)
    core.add(prompt_of(70, 1), LONG)  # two steps of prefill
    assert turns_of(core, 8) == [1, 1, 1, 2, 4, 8, 8, 8]
    core.add(prompt_of(4, 2), LONG)
    assert turns_of(core, 5) == [1, 1, 2, 4, 8]
    core.abort(1, 2)
    assert turns_of(core, 2) == [8, 8]


def test_one_turn_while_anybody_waits() -> None:
    core = core_of(8, max_num_seqs=2)
    for seed in range(3):
        core.add(prompt_of(5, seed), LONG)
    assert set(turns_of(core, 20)) == {1}
    core.abort(3)
    assert turns_of(core, 4) == [1, 2, 4, 8]


def test_no_more_turns_than_anybody_may_take() -> None:
    """The longest row's tokens end them, and the model's length ends everybody's."""
    core = core_of(8)
    core.add(prompt_of(5), replace(LONG, max_tokens=6))
    core.add(prompt_of(5, 1), replace(LONG, max_tokens=13))
    # outputs 1 | 2 | 3 4 | 5 - 8 | 9 - 13: the first row's last token is its sixth, in the fourth step
    assert turns_of(core, 7) == [1, 1, 2, 4, 5]
    core = core_of(8, max_model_len=32)
    key = core.add(prompt_of(20), replace(LONG, max_tokens=None))
    core.run()
    assert core.answers[key].tokens == alone(prompt_of(20), replace(LONG, max_tokens=12)).tokens


def test_one_turn_where_pages_are_short() -> None:
    """Nobody is preempted for pages of further turns."""
    core = core_of(8, num_pages=(9,), page_tokens=4, unit_tokens=4, extra={"enable_prefix_caching": False})
    keys = [core.add(prompt_of(9, seed), replace(LONG, max_tokens=7)) for seed in range(2)]  # 16 tokens: 4 pages each
    core.run()
    assert core.scheduler.state.counters.preemptions == 0
    for seed, key in enumerate(keys):
        assert core.answers[key].tokens == alone(prompt_of(9, seed), replace(LONG, max_tokens=7)).tokens


@pytest.mark.parametrize(
    ("most", "windows", "in_flight"),
    [(2, (None,), 2), (8, (None,), 1), (8, (24,), 2), (8, (None, 20), 2), (64, (None,), 2), (64, (9, 24), 2)],
)
def test_the_answers_are_those_of_single_turns(most: int, windows: tuple[int | None, ...], in_flight: int) -> None:
    """Stop ids, ends by length, borders of pages and windows in the middle of a step; arrivals and aborts between."""
    sizes = {"windows": windows, "pools": (0,) * len(windows), "num_pages": (200,), "page_tokens": 4, "unit_tokens": 4}
    core = core_of(most, max_in_flight=in_flight, **sizes)
    rng = np.random.default_rng(most)
    asked: dict[int, tuple[list[int], SamplingParams]] = {}
    several = 0
    for turn in range(160):
        if turn % 16 == 0 and turn < 120:
            for _ in range(int(rng.integers(1, 4))):
                prompt, params = prompt_of(int(rng.integers(1, 60)), turn), KINDS[int(rng.integers(len(KINDS)))]
                asked[core.add(prompt, params)] = prompt, params
        if turn % 40 == 39:
            core.abort(int(rng.integers(1, core.next_key)))
        several += sum(count > 1 for count in turns_of(core, 1))
    core.run()
    assert several > 20, "the traffic left nothing to take several turns for"
    for key, (prompt, params) in asked.items():
        if key in core.aborted:
            continue
        answer, wanted = core.answers[key], alone(prompt, params)
        assert (answer.tokens, answer.finish, answer.stop_token) == (wanted.tokens, wanted.finish, wanted.stop_token)
        if params.logprobs is not None:
            assert answer.logprobs == wanted.logprobs
    assert all(pool.num_free == pool.num_pages - 1 for pool in core.scheduler.state.kv.pools)


def test_what_was_computed_is_found_again() -> None:
    """A row that ends within a step keys exactly the tokens that were computed, and the next request reads them."""
    core = core_of(8, page_tokens=4, unit_tokens=4, num_pages=(200,))
    params = replace(LONG, max_tokens=30)
    key = core.add(prompt_of(10), params)
    core.run()
    again = core.add(prompt_of(10) + core.answers[key].tokens, replace(LONG, max_tokens=3))
    core.run()
    assert core.answers[again].num_cached == 36  # 39 of 40 tokens were computed, 9 whole units of them
    assert core.answers[again].tokens == alone(prompt_of(10) + core.answers[key].tokens, LONG).tokens[:3]


def test_nothing_is_keyed_that_was_not_computed() -> None:
    """A row ends in the middle of a step: the index has the keys of what it has, and no others."""
    core = core_of(8, page_tokens=4, unit_tokens=4, num_pages=(200,))
    first, second = core.add(prompt_of(10), replace(LONG, max_tokens=26)), core.add(prompt_of(10, 1), LONG)
    requests = [entry.request for entry in core.scheduler.state.waiting]
    while not core.answers[first].ended:
        core.step()
    core.abort(second)
    core.run()
    kv = core.scheduler.state.kv
    known = {key for request in requests for key in chain_keys(kv.root(b""), request.all_tokens()[:-1], 4)}
    assert len(requests[0].all_tokens()) == 36 and set(kv.tables[0].index.page_of) <= known


def test_pages_behind_a_window_wait_for_steps_in_flight() -> None:
    """A row that stopped in a step in flight is not as far on as planned: its next step reads pages further back.

    Pages are few, so that what is given back is written again at once.
    """
    core = core_of(
        8, windows=(7,), page_tokens=1, unit_tokens=1, num_pages=(137,), max_num_seqs=4, max_num_batched_tokens=16,
        extra={"enable_prefix_caching": False},
    )  # fmt: skip
    for i, (length, count) in enumerate(((6, 34), (16, 77), (10, 30), (16, 55))):
        stops = list(range(10, 18)) if i % 2 else []
        core.add(
            prompt_of(length, i + 10), replace(LONG, max_tokens=count, temperature=1.0, seed=i, stop_token_ids=stops)
        )
    assert sum(count > 1 for count in turns_of(core, 60)) >= 5
    assert not core.loop.has_work


class Lazy(Noting):
    """Once, the first row takes a turn less than planned, for no reason."""

    done = False

    def collect(self, handle: StepHandle) -> Sequence[StepResult]:
        (result,) = super().collect(handle)
        if self.done or result.tokens.shape[1] < 8:
            return [result]
        self.done = True
        return [replace(result, num_sampled=result.num_sampled - (np.arange(len(result.num_sampled)) == 0))]


def test_a_row_that_stops_for_nothing_is_at_fault() -> None:
    """The engine planned on from its turns: it ends alone, with an error."""
    core = core_of(8, executor=Lazy)
    first, second = (core.add(prompt_of(5, seed), replace(LONG, max_tokens=40)) for seed in range(2))
    core.run()
    assert core.answers[first].error == "device_error"
    assert core.answers[second].tokens == alone(prompt_of(5, 1), replace(LONG, max_tokens=40)).tokens


def test_a_plan_of_several_turns_has_decode_rows_alone() -> None:
    core = core_of(8)
    for seed in range(4):
        core.add(prompt_of(30 + seed, seed), LONG)
    plans: list[StepPlan] = []
    for _ in range(20):
        core.step()
        if core.scheduler.in_flight:
            plans.append(core.scheduler.in_flight[-1].plan)
    several = [plan for plan in plans if plan.num_steps > 1]
    assert several
    for plan in several:
        assert plan.opened is None and (plan.num_new == 1).all() and (plan.num_logits == 1).all()


def test_no_turns_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_steps: 0"):
        core_of(0)
