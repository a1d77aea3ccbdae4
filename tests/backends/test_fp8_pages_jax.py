"""KV pages of e4m3 on the jax backend: the contract of a runner, and how far they are from float32 pages."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from backends.jax.runner import Runner
from engine.runner import ModelRunner, Placement, RunnerConfig
from engine.specs.cache import CacheLayout
from pallas_kernels import dispatch
from tests.backends.conformance import Conformance
from tests.backends.driver import Driver


class Fp8Runner(Runner):
    """A runner that keeps pages in e4m3, whatever it was asked for."""

    def configure(self, config: RunnerConfig, place: Placement) -> None:
        super().configure(replace(config, kv_dtype="fp8_e4m3"), place)

    def allocate_cache(self, layout: CacheLayout) -> None:
        super().allocate_cache(replace(layout, kv_dtype="fp8_e4m3"))


class TestFp8Pages(Conformance):
    @classmethod
    def make_runner(cls) -> ModelRunner:
        return Fp8Runner()


def logprobs(runner: Runner) -> np.ndarray:
    d = Driver(runner, seed=4)
    seqs = [d.new(d.prompt(length), num_logprobs=3) for length in (40, 9, 21)]
    d.generate(seqs, 1)
    return np.array([seq.logprobs[0] for seq in seqs])


def test_near_to_float32_pages() -> None:
    """Rounded to 3 bits of mantissa: near, and not the same."""
    runner = Fp8Runner()
    rounded, exact = logprobs(runner), logprobs(Runner())
    assert runner._state is not None and all(cache.dtype == jnp.uint8 for cache in runner._state.caches)
    assert 1e-5 < np.abs(rounded - exact).max() < 0.2


def test_what_is_too_large_is_the_largest() -> None:
    from pallas_kernels.paged_attention import read, write

    cache = jnp.zeros((1, 2, 2, 1, 4, 16), dispatch.cache_dtype("fp8_e4m3", "cpu"))
    k = jnp.full((1, 1, 16), 1e6).at[0, 0, 1].set(-3.3).at[0, 0, 2].set(jnp.nan)
    keys, values = read(write(k, -k, cache, 0, jnp.array([1]), jnp.array([2])), 0, jnp.array([1]))
    np.testing.assert_array_equal(keys[0, 0, 2, :4], [448, -3.25, 0, 448])
    np.testing.assert_array_equal(values[0, 0, 2, :4], [-448, 3.25, 0, -448])
