"""What one request may ask of the scheduler, and what it refuses: one idea a test, over the fake runner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import ConfigError, InvalidValue, NeverFits, Overloaded
from engine.params import SamplingParams
from engine.request import FinishReason, Request
from engine.scheduler.scheduler import Scheduler
from tests.engine.scheduler.harness import EOS, VOCAB, Core, Sizes, alone, layout_of, prompt_of, scheduler_config

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def scheduler(**extra: object) -> Scheduler:
    sizes = Sizes(extra=extra)
    return Scheduler(scheduler_config(sizes), layout_of(sizes))


def request(key: int = 1, prompt: list[int] | None = None, **fields: object) -> Request:
    params = SamplingParams(**fields.pop("params", {}))  # type: ignore[arg-type]
    ids = np.array(prompt_of(20) if prompt is None else prompt, np.int32)
    return Request(key=key, prompt=ids, params=params, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [1, VOCAB]}, "prompt"),
        ({"prompt": [1, 2**31 - 1]}, "prompt"),
        ({"stop_ids": (VOCAB,)}, "stop_token_ids"),
        ({"stop_ids": (-1,)}, "stop_token_ids"),
        ({"stop_ids": tuple(range(90)) * 2}, "stop_token_ids"),
        ({"bad_word_ids": ((5, VOCAB),)}, "bad_words"),
        ({"bad_word_ids": ((),)}, "bad_words"),
        ({"bad_word_ids": ((1,) * 17,)}, "bad_words"),
        ({"bad_word_ids": ((1,),) * 129}, "bad_words"),
        ({"params": {"logit_bias": {VOCAB: 1.0}}}, "logit_bias"),
        ({"params": {"logit_bias": {-1: 1.0}}}, "logit_bias"),
        ({"params": {"allowed_token_ids": [VOCAB]}}, "allowed_token_ids"),
        ({"params": {"logprobs": 21}}, "logprobs"),
        ({"params": {"logprobs": -1}}, "logprobs"),
        ({"params": {"prompt_logprobs": 21}}, "prompt_logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -1}, "seed"),
        ({"priority": 2**60}, "priority"),
    ],
)
def test_what_could_hurt_a_step_is_refused_at_admission(bad: dict[str, object], param: str) -> None:
    """R3: ids in [0, V), lists that fit the device's tables."""
    core = scheduler()
    with pytest.raises(InvalidValue) as caught:
        core.add(request(**bad))  # type: ignore[arg-type]
    assert caught.value.param == param
    assert not core.has_work


@pytest.mark.parametrize("length", [256, 255])
def test_what_never_fits_is_refused(length: int) -> None:
    """S-7: by the model length; 255 tokens leave room for one."""
    core = scheduler()
    if length == 255:
        core.add(request(prompt=prompt_of(length)))
        return
    with pytest.raises(NeverFits):
        core.add(request(prompt=prompt_of(length)))


def test_what_never_fits_the_pages_is_refused() -> None:
    """S-7: three pages of 16 tokens hold 48; min_tokens counts."""
    sizes = Sizes(num_pages=(4,))
    core = Scheduler(scheduler_config(sizes), layout_of(sizes))
    assert core.state.capacity == 48
    core.add(request(1, prompt_of(47)))
    with pytest.raises(NeverFits, match="KV cache"):
        core.add(request(2, prompt_of(48)))
    with pytest.raises(NeverFits):
        core.add(request(3, prompt_of(40), params={"min_tokens": 9, "max_tokens": 9}))


def test_a_full_queue_refuses() -> None:
    core = scheduler(max_waiting=2)
    core.add(request(1))
    core.add(request(2))
    with pytest.raises(Overloaded):
        core.add(request(3))


def test_a_key_is_used_once() -> None:
    core = scheduler()
    core.add(request(1))
    with pytest.raises(InvalidValue):
        core.add(request(1))


def test_a_refusal_is_answered_and_changes_nothing() -> None:
    core = Core()
    good = core.add(prompt_of(20), GREEDY)
    bad = core.add([VOCAB], GREEDY)
    core.run()
    assert core.answers[bad].error == "invalid_value"
    assert core.answers[good].tokens == alone(prompt_of(20), GREEDY).tokens


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 3),
        ("policy", "lifo"),
        ("row_buckets", (1, 4)),
        ("token_buckets", (64, 32)),
        ("max_in_flight", 0),
        ("aging_steps", 0),
    ],
)
def test_a_config_that_cannot_work_names_its_field(field: str, value: object) -> None:
    config = scheduler_config(Sizes())
    with pytest.raises(ConfigError, match=field):
        replace(config, **{field: value})


def test_a_stop_id_ends_at_once_and_is_told() -> None:
    """S-11."""
    free = alone(prompt_of(30), GREEDY).tokens
    stop = free[5]
    first = free.index(stop)
    core = Core()
    key = core.add(prompt_of(30), replace(GREEDY, stop_token_ids=[stop]))
    core.run()
    answer = core.answers[key]
    assert answer.tokens == free[: first + 1]
    assert (answer.finish, answer.stop_token) == (FinishReason.STOP, stop)


def test_eos_ends_unless_ignored_and_min_tokens_puts_it_off() -> None:
    """S-11: with min_tokens the ids are banned, then allowed."""
    params = SamplingParams(temperature=0.0, max_tokens=200)
    short = alone(prompt_of(30), params)
    assert short.finish is FinishReason.STOP and short.tokens[-1] == EOS
    least = len(short.tokens) + 3
    core = Core()
    key = core.add(prompt_of(30), replace(params, min_tokens=least))
    core.run()
    assert len(core.answers[key].tokens) >= least
    assert EOS not in core.answers[key].tokens[:least]


def test_the_model_length_ends_a_request_without_max_tokens() -> None:
    core = Core()
    key = core.add(prompt_of(100), SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    core.run()
    assert len(core.answers[key].tokens) == 256 - 100
    assert core.answers[key].finish is FinishReason.LENGTH


def test_seeds_are_the_rows_own() -> None:
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=20, ignore_eos=True)
    core = Core()
    keys = [core.add(prompt_of(30), params), core.add(prompt_of(30), replace(params, seed=5))]
    core.run()
    assert core.answers[keys[0]].tokens == alone(prompt_of(30), params).tokens
    assert core.answers[keys[0]].tokens != core.answers[keys[1]].tokens


@pytest.mark.parametrize("caching", [True, False])
def test_n_sequences_compute_their_prompt_once(caching: bool) -> None:
    core = Core(Sizes(extra={"enable_prefix_caching": caching}))
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=5, ignore_eos=True, n=3)
    key = core.add(prompt_of(100), params)
    computed = 0
    while core.loop.has_work:
        core.step()
        if core.scheduler.in_flight:
            plan = core.scheduler.in_flight[-1].plan
            computed += int(plan.num_new[plan.num_new > 1].sum())
    assert computed == 100 + 2 * 4, "the others compute what is behind the last whole unit"
    answers = [core.answers[key + i] for i in range(3)]
    assert [answer.num_cached for answer in answers] == [0, 96, 96]
    for i, answer in enumerate(answers):
        assert answer.tokens == alone(prompt_of(100), replace(params, n=1, seed=4 + i)).tokens


def test_n_sequences_without_a_cache_share_with_nobody_else() -> None:
    core = Core(Sizes(extra={"enable_prefix_caching": False}))
    core.add(prompt_of(100), replace(GREEDY, n=2))
    core.run()
    key = core.add(prompt_of(100), replace(GREEDY, n=2))
    core.run()
    assert core.answers[key].num_cached == 0


def test_domains_do_not_share() -> None:
    """P-13."""
    core = Core()
    core.add(prompt_of(100), GREEDY, domain=b"a")
    core.run()
    other, same = core.add(prompt_of(100), GREEDY, domain=b"b"), core.add(prompt_of(100), GREEDY, domain=b"a")
    core.run()
    assert (core.answers[other].num_cached, core.answers[same].num_cached) == (0, 96)


def test_logprobs_come_with_their_tokens() -> None:
    params = replace(GREEDY, logprobs=2)
    core = Core()
    key = core.add(prompt_of(30), params)
    core.add(prompt_of(31), GREEDY)
    core.run()
    assert len(core.answers[key].logprobs) == 12
    assert core.answers[key].logprobs == alone(prompt_of(30), params).logprobs


@pytest.mark.parametrize("most", [7, 1024])
def test_prompt_logprobs_are_whole_however_they_are_chunked(most: int) -> None:
    """S-9. They read no hits, and come once, whole."""
    params = replace(GREEDY, prompt_logprobs=1)
    core = Core(Sizes(extra={"max_prompt_logprob_tokens": most}))
    core.add(prompt_of(70), GREEDY)
    core.run()
    key = core.add(prompt_of(70), params)
    core.run()
    columns = core.answers[key].prompt_logprobs
    assert columns is not None
    assert len(columns.chosen) == 4 * 69
    assert columns == alone(prompt_of(70), params).prompt_logprobs
    assert core.answers[key].num_cached == 0


def test_a_prompt_of_one_token_has_no_prompt_logprobs() -> None:
    core = Core()
    key = core.add([20], replace(GREEDY, prompt_logprobs=1))
    core.run()
    assert core.answers[key].prompt_logprobs is None
    assert len(core.answers[key].tokens) == 12


def test_the_cache_may_be_passed_by() -> None:
    core = Core()
    core.add(prompt_of(100), GREEDY)
    core.run()
    key = core.add(prompt_of(100), replace(GREEDY, skip_reading_prefix_cache=True))
    core.run()
    assert core.answers[key].num_cached == 0


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    """Generated units are keyed once collected: a conversation goes on from its whole history."""
    core = Core()
    params = replace(GREEDY, max_tokens=60)
    key = core.add(prompt_of(20), params)
    core.run()
    history = prompt_of(20) + core.answers[key].tokens
    following = core.add([*history, 9, 10], GREEDY)
    core.run()
    # the last sampled token was never computed
    assert core.answers[following].num_cached == (len(history) - 1) // 16 * 16
    assert core.answers[following].tokens == alone([*history, 9, 10], GREEDY).tokens
