"""KV pages of int8 on the jax backend: the contract of a runner, and a float32 cache rounded when it is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from backends.jax.runner import Runner
from engine.config import CacheConfig, EngineConfig, ModelConfig, ScheduleConfig
from engine.resolve import plan_cache, resolve
from engine.runner import ModelRunner, Placement
from engine.specs.cache import INT8_PAGES, cache_groups
from pallas_kernels import dispatch, paged_attention
from pallas_kernels.int8_pages import NAME, Int8Pages
from tests.backends.conformance import Conformance
from tests.backends.driver import Driver, layout, llama
from tests.backends.int8_runner import Int8Runner
from tests.backends.test_aot import SMALL, built, runner_config


class TestInt8Pages(Conformance):
    @classmethod
    def make_runner(cls) -> ModelRunner:
        return Int8Runner()


def rounded(x: np.ndarray) -> np.ndarray:
    """Each head of each token to the nearest of 255 numbers, equally far apart. x: f32 [..., H]."""
    largest = np.abs(x).max(axis=-1, keepdims=True).astype(np.float32)
    step = (np.maximum(largest, 1e-12) * np.float32((1 + 1 / 256) / 127)).astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.rint(x / step).clip(-127, 127) * step


def served(runner: Runner, dtype: str = "float32") -> tuple[list[list[int]], np.ndarray]:
    """Prompts in chunks, decode steps one by one and in turns, a page shared by copy."""
    d = Driver(runner, llama(windows=(None, 20, None)), seed=4, dtype=dtype)
    seqs = [d.new(d.prompt(length), num_logprobs=3) for length in (40, 9, 21)]
    d.generate(seqs, 4, chunk=24)
    d.step([(seq, 1) for seq in seqs], num_steps=3)
    copy = d.new([*seqs[0].tokens[:38], 7, 5], num_logprobs=3)
    copies = d.share(copy, seqs[0], 38)
    assert copies is not None
    d.step([(copy, 2)], copies=copies)
    d.generate([copy], 2)
    seqs.append(copy)
    found = [seq.outputs for seq in seqs], np.concatenate([np.array(seq.logprobs).ravel() for seq in seqs])
    runner.shutdown()
    return found


def test_as_a_float32_cache_rounded_at_the_write(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, logprobs = served(Int8Runner())
    exact = served(Runner())[1]
    plain_write = paged_attention.write

    def write(k: jax.Array, v: jax.Array, *args: jax.Array) -> jax.Array:
        k, v = (jax.pure_callback(rounded, jax.ShapeDtypeStruct(x.shape, x.dtype), x) for x in (k, v))
        return plain_write(k, v, *args)

    monkeypatch.setattr(paged_attention, "write", write)
    monkeypatch.setattr(dispatch, "choose_kernel", lambda platform, head_size: "plain")
    wanted, wanted_logprobs = served(Runner())
    assert tokens == wanted
    np.testing.assert_allclose(logprobs, wanted_logprobs, atol=1e-4)
    assert 1e-4 < np.abs(logprobs - exact).max() < 0.05  # near to pages of float32, and not the same


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "fp8_e4m3", INT8_PAGES])
def test_pages_take_what_was_planned(kv_dtype: str) -> None:
    """Of groups with and without a window, in pools of their own."""
    arch = llama(windows=(None, 20, None))
    config = EngineConfig(
        cache=CacheConfig(kv_cache_dtype=kv_dtype),
        model=ModelConfig(load_format="dummy", max_model_len=256),
        schedule=ScheduleConfig(max_num_seqs=4, max_num_batched_tokens=16),
    )
    runner = Runner()
    resolved = resolve(config, arch, runner.describe("cpu"))
    runner.configure(replace(resolved.runner, device="cpu"), Placement())
    runner.load(None)
    planned, _, _ = plan_cache(config, resolved, 1 << 20)
    runner.allocate_cache(planned)
    assert runner._state is not None and len(planned.pools) == 2
    for pool, cache in zip(planned.pools, runner._state.caches, strict=True):
        assert sum(array.nbytes for array in jax.tree.leaves(cache)) == pool.num_pages * pool.page_bytes


def test_loaded_programs(tmp_path: Path) -> None:
    """Codes and scales are written and copied by programs of a bundle, built where a runner has run them before."""
    config = runner_config(kv_dtype=INT8_PAGES)
    pages = replace(layout(cache_groups(config.arch), num_pages=64), kv_dtype=INT8_PAGES)
    outputs = []
    for loads in (False, True):
        told = {"executables": str(built(config, pages, tmp_path))} if loads else {}
        d = Driver(Runner(), seed=2, kv_dtype=INT8_PAGES, **SMALL, **told)
        source = d.new(d.prompt(25), num_logprobs=3)
        d.generate([source], 4, chunk=16)
        copy = d.new([*source.tokens[:20], 3])
        d.step([(copy, 1)], copies=d.share(copy, source, 20))
        d.generate([copy], 4)
        assert (d.runner.num_compiles() == 0) == loads
        outputs.append((source.outputs, source.logprobs, copy.outputs))
        d.runner.shutdown()
    assert outputs[0] == outputs[1]


def test_what_is_kept() -> None:
    """Codes and scales as they lie on a CPU; a head of zeros, the largest numbers, and none that is not finite."""
    assert NAME == INT8_PAGES and NAME in dispatch.NARROW
    kept = dispatch.cache_arrays("cpu", NAME, num_layers=1, num_pages=2, page_tokens=4, num_kv_heads=2, head_size=16)
    assert [(array.shape, array.dtype, array.heads_axis) for array in kept] == [
        ((1, 2, 2, 2, 4, 16), jnp.int8, 3),
        ((1, 2, 2, 2, 4), jnp.uint16, 3),
    ]
    cache = Int8Pages(codes=jnp.zeros(kept[0].shape, jnp.int8), scales=jnp.zeros(kept[1].shape, jnp.uint16))
    k = jnp.zeros((1, 2, 16)).at[0, 1, :4].set(jnp.array([3e38, -3e38, jnp.nan, jnp.inf]))
    changed = paged_attention.write(k, -k, cache, 0, jnp.array([1]), jnp.array([2]))
    keys, values = paged_attention.read(changed, 0, jnp.array([1]))
    np.testing.assert_allclose(keys[0, 1, 2, :4], [3e38, -3e38, 0, 0], rtol=1e-2)
    np.testing.assert_array_equal(values, -keys)
    assert not np.asarray(keys)[0, 0].any() and not np.asarray(keys)[0, :, [0, 1, 3]].any()
