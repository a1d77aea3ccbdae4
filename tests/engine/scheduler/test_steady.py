"""The shortcuts of a step give what the long way gives: rows kept in place, pages ahead, lazy keys, late commits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.soak import Soak, soak_layout
from engine.params import SamplingParams
from engine.scheduler.scheduler import PAGE_TURNS, Scheduler
from tests.engine.scheduler.harness import Core, Sizes, alone, prompt_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
KINDS = (
    GREEDY,
    replace(GREEDY, max_tokens=1),
    replace(GREEDY, max_tokens=40),
    replace(GREEDY, temperature=1.0, seed=3, logprobs=2),
    replace(GREEDY, repetition_penalty=1.4, max_tokens=25),
    replace(GREEDY, ignore_eos=False, stop_token_ids=list(range(10, 30)), max_tokens=60),
    replace(GREEDY, prompt_logprobs=1),
)


def disturb(core: Core, rng: np.random.Generator) -> None:
    """A request comes, one goes, or the last in order gives way."""
    luck = rng.random()
    if luck < 0.5:
        length = int(rng.choice([1, 2, 15, 16, 17, 40, 90, 150]))
        params = KINDS[int(rng.integers(len(KINDS)))]
        core.add(prompt_of(length, int(rng.integers(4))), params, priority=int(rng.integers(-2, 3)))
    elif luck < 0.6 and core.next_key > 1:
        core.abort(int(rng.integers(1, core.next_key)))
    elif luck < 0.65 and len(core.scheduler.state.running) > 1:
        core.scheduler.state.preempt(int(core.scheduler.state.running.slots[-1]))


def rows_of(core: Core) -> tuple[object, ...]:
    """What the last plan does for whom, whatever the order of its rows and the slots that they got."""
    plan, table = core.scheduler.in_flight[-1].plan, core.scheduler.state.table
    keys = np.where(table.generation[plan.slots] == plan.generation, table.key[plan.slots], -1)  # -1 = it has ended
    rows = zip(keys.tolist(), plan.num_computed.tolist(), plan.num_new.tolist(), plan.num_logits.tolist(), strict=True)
    opened = None if plan.opened is None else table.key[plan.opened.slots].tolist()
    num_closed = 0 if plan.closed is None else len(plan.closed)
    return sorted(rows), plan.sampler, plan.num_logprobs, plan.bucket, opened, num_closed


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_kept_in_place_are_those_of_starting_over(policy: str, seed: int) -> None:
    """A scheduler that looks at every running row in every step plans the same."""
    sizes = Sizes(num_pages=(400,), windows=(None, 40), pools=(0, 0), extra={"policy": policy})
    kept, starts_over = Core(sizes), Core(sizes)
    steady = 0
    for turn in range(150):
        for core in (kept, starts_over):
            disturb(core, np.random.default_rng((seed, turn)))
        starts_over.scheduler._builder.forget_steady()
        plans = []
        for core in (kept, starts_over):
            before = core.scheduler.state.counters.steps
            core.step()
            core.scheduler.check_integrity()
            plans.append(rows_of(core) if core.scheduler.state.counters.steps > before else None)
        assert plans[0] == plans[1]
        steady += len(kept.scheduler._builder.steady.slots) > 1
    assert steady > 50, "the traffic left nothing to keep"
    for core in (kept, starts_over):
        core.run()
    assert kept.answers == starts_over.answers


def pages_given(num_pages: int) -> list[int]:
    """Pages given out in each step in which four rows of up to 22 tokens decode together, one token a page."""
    core = Core(Sizes(num_pages=(num_pages,), page_tokens=1, unit_tokens=1, extra={"enable_prefix_caching": False}))
    keys = [core.add(prompt_of(10, i), GREEDY) for i in range(4)]
    given = []
    while core.loop.has_work:
        core.step()
        core.scheduler.check_integrity()
        pool = core.scheduler.state.kv.pools[0]
        assert pool.num_pages - 1 - pool.num_free <= 4 * 22, "more than the rows may ever fill"
        if core.scheduler.in_flight:
            deltas = core.scheduler.in_flight[-1].plan.page_deltas
            given.append(sum(len(delta.pages) for delta in deltas if delta is not None))
    assert core.scheduler.stats().num_preemptions == 0
    for i, key in enumerate(keys):
        assert core.answers[key].tokens == alone(prompt_of(10, i), GREEDY).tokens
    return given[1:]  # without the prompts


def test_pages_of_some_turns_are_taken_at_once_while_they_are_plenty() -> None:
    given = pages_given(400)
    assert max(given) == 4 * PAGE_TURNS and given.count(0) > len(given) / 2


def test_pages_are_taken_when_they_are_needed_where_they_are_short() -> None:
    """What a row may hold ahead of time is not there: the last token of each is never computed."""
    given = pages_given(1 + 4 * 21)
    assert given.count(4) >= 3, "the last pages were not taken turn by turn"


def test_a_row_of_another_length_joins_and_leaves_without_starting_over() -> None:
    """Prompts in chunks beside decoding rows: those stay steady all the while."""
    core = Core(Sizes(num_pages=(400,), max_num_batched_tokens=16))
    core.add(prompt_of(10), replace(GREEDY, max_tokens=60))
    for _ in range(4):
        core.step()
    core.add(prompt_of(100, 1), replace(GREEDY, max_tokens=5))
    sizes = []
    for _ in range(20):
        core.step()
        core.scheduler.check_integrity()
        plan = core.scheduler.in_flight[-1].plan
        assert plan.num_new[0] == 1, "the decoding row waits for the prompt"
        sizes.append((len(core.scheduler._builder.steady.slots), plan.num_rows))
    assert (1, 2) in sizes and (2, 2) in sizes and sizes[-1] == (1, 1)


class LateCommits(Scheduler):
    """The core never calls in while the device works."""

    def commit_keys(self) -> None:
        pass


def test_nothing_depends_on_the_overlapped_window() -> None:
    run = Soak(5, check_every=1)
    run.scheduler = LateCommits(run.scheduler.config, soak_layout())
    run.until(700, report=False)
    assert run.count.finished + run.count.aborted + run.count.failed == 700


def test_what_a_plan_opens_is_what_was_asked() -> None:
    """Every number of the sampling table, gathered in blocks."""
    core = Core(Sizes(num_pages=(400,)))
    asked = [
        SamplingParams(
            temperature=0.25 * (i + 1),
            top_p=0.5 + 0.1 * i,
            min_p=0.125 * i,
            top_k=7 + i,
            presence_penalty=0.25 + i,
            frequency_penalty=-0.5 - 0.25 * i,
            repetition_penalty=1.25 + i,
            seed=99 + i,
            min_tokens=2 + i,
            max_tokens=20 + i,
            logprobs=i,
            stop_token_ids=[20 + i, 40],
            logit_bias={30 + i: 1.5 - i},
            allowed_token_ids=list(range(10, 60 + i)),
        )
        for i in range(2)
    ]
    for i, params in enumerate(asked):
        core.add(prompt_of(20 + i, i), params)
    core.step()
    opened = core.scheduler.in_flight[-1].plan.opened
    assert opened is not None and len(opened.slots) == 2
    sampling = opened.sampling
    for i, params in enumerate(asked):
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "top_k",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "seed",
            "min_tokens",
        ):
            assert getattr(sampling, name)[i] == pytest.approx(getattr(params, name)), name
        assert (sampling.num_outputs[i], sampling.max_outputs[i], sampling.num_logprobs[i]) == (0, 20 + i, i)
        assert sampling.bias_ids is not None and sampling.allowed_ids is not None and sampling.history is not None
        for ragged, wanted in (
            (sampling.stop_ids, [20 + i, 40, 7]),
            (sampling.bias_ids, [30 + i]),
            (sampling.allowed_ids, list(range(10, 60 + i))),
            (sampling.history, prompt_of(20 + i, i)),
        ):
            assert ragged.values[ragged.starts[i] : ragged.starts[i + 1]].tolist() == wanted
