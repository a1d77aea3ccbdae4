"""Gates on the compiled programs: no copy of the cache or of the weights, nothing compiled while steps run."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest
from jax import monitoring

from backends.jax.programs import ProgramSet
from backends.jax.runner import Runner
from backends.jax.split import Split
from backends.jax.weights import load_params
from engine.errors import InternalError, StepFailed
from engine.runner import RunnerConfig, SamplerLimits
from engine.specs.arch import ArchSpec
from engine.specs.cache import cache_groups
from engine.specs.weights import dummy_params
from engine.step import Bucket
from pallas_kernels import cpu_attention, cpu_linear
from tests.backends.driver import Driver, layout, llama

LIMITS = SamplerLimits(max_logprobs=5, max_logit_bias=16, max_stop_ids=8, max_bad_words=4, max_bad_word_len=4)


def programs(arch: ArchSpec, dtype: str, num_pages: int, kv_dtype: str) -> ProgramSet:
    config = RunnerConfig(
        arch=arch, dtype=dtype, kv_dtype=kv_dtype, max_slots=4, max_model_len=64, page_tokens=(16,),
        token_buckets=(4, 32), row_buckets=(4,), load_format="dummy", sampler_limits=LIMITS, max_num_steps=4,
    )  # fmt: skip
    split = Split([jax.devices("cpu")[0]])
    pages = replace(layout(cache_groups(arch), num_pages=num_pages), kv_dtype=kv_dtype)
    params = load_params(arch, dummy_params(arch, 0), dtype, split)
    made = ProgramSet(config, pages, params, split)
    made.compile(lambda phase, done, total: None)
    return made


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "kernel"),
    [
        ("float32", "float32", "C++"),
        ("float32", "float32", "plain"),
        ("bfloat16", "bfloat16", "C++"),
        ("bfloat16", "bfloat16", "plain"),
        ("bfloat16", "int8_per_token_head", "plain"),
    ],
)
def test_no_whole_copies(dtype: str, kv_dtype: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory does not grow with the cache, and stays under the size of the embedding table."""
    if kernel == "plain":
        monkeypatch.setattr(cpu_attention, "available", lambda head_size: False)
        monkeypatch.setattr(cpu_linear, "available", lambda x, weight: False)
    arch = llama(vocab_size=20_000, windows=(None, None, None))
    table_bytes = arch.vocab_size * arch.hidden_size * (4 if dtype == "float32" else 2)
    small = programs(arch, dtype, 40, kv_dtype)
    large = programs(arch, dtype, 400, kv_dtype)
    steps = (("forward", 4), ("forward", 32), ("turns", 4))
    for name in (*steps, ("copy", 0), ("sample", 4), ("open",), ("open_counts",)):
        assert large.temp_bytes(name) <= small.temp_bytes(name) + 1024, name
    for tokens in (4, 32):
        assert large.temp_bytes(("forward", tokens)) < table_bytes / 2
    # a loop makes nothing of the weights in front of it
    assert large.temp_bytes(("turns", 4)) <= large.temp_bytes(("forward", 4)) + large.temp_bytes(("sample", 4))


def test_nothing_compiles_while_steps_run() -> None:
    """Asked of jax itself, for every kind of step: not even an array operation outside the programs."""
    d = Driver(Runner(), max_slots=3, token_buckets=(2, 16), row_buckets=(2,), sampler_limits=LIMITS)
    compiled: list[str] = []

    def listen(event: str, _: float, **__: object) -> None:
        if "compile" in event:
            compiled.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    for sampling in ({}, {"temperature": 1.0, "seed": 5, "num_logprobs": 3, "repetition": 1.2, "bias": {3: 1.0}}):
        seq, other = d.new(d.prompt(12), **sampling), d.new(d.prompt(4))
        d.generate([seq, other], 4, chunk=8)
        d.step([(seq, 1), (other, 1)], num_steps=3)
        copy = d.new(seq.tokens[:10] + d.prompt(3))
        d.close(other)
        d.step([(copy, 3)], copies=d.share(copy, seq, 10))
        for each in (seq, copy):
            d.close(each)
    assert compiled == []
    d.runner.shutdown()


def test_an_unknown_bucket_is_refused() -> None:
    d = Driver(Runner(), max_slots=3, token_buckets=(2, 16), row_buckets=(2,), sampler_limits=LIMITS)
    plan = d.plan([(d.new(d.prompt(9)), 9)])
    with pytest.raises(InternalError, match="no bucket of 12 tokens"):
        d.runner.submit([replace(plan, bucket=Bucket(tokens=12, rows=2))])
    d.runner.shutdown()


def test_a_lost_cache_is_reported_and_made_anew() -> None:
    d = Driver(Runner(), max_slots=3, token_buckets=(2, 16), row_buckets=(2,), sampler_limits=LIMITS)
    prompt = d.prompt(9)
    first = d.new(prompt)
    d.generate([first], 4)
    runner = d.runner
    assert isinstance(runner, Runner) and runner._state is not None
    for array in runner._state.caches:
        array.delete()
    handle = runner.submit([d.plan([(first, 1)])])
    with pytest.raises(StepFailed) as failure:
        runner.collect(handle)
    assert failure.value.cache_lost
    with pytest.raises(InternalError, match="another generation"):  # every slot is closed
        runner.submit([d.plan([(first, 1)])])
    first.opened = False
    d.close(first)
    again = d.new(prompt)
    d.generate([again], 4)
    assert again.outputs == first.outputs
    runner.shutdown()
