"""Moving pages by DMA in Pallas's interpreter on the CPU, against plain indexing, with the race detector on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_pages

LAYERS, PAGES, WIDTH = 2, 24, 128


def interpret(dma_execution_mode: str = "on_wait") -> pltpu.InterpretParams:
    return pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma_execution_mode)


def cache_of(seed: int, page: int = 64) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(LAYERS, PAGES, 2, page, WIDTH)), jnp.bfloat16)


def ints(*values: int) -> jax.Array:
    return jnp.array(values, jnp.int32)


def same(found: jax.Array, wanted: jax.Array) -> None:
    assert not interpreter.races.races_found
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    tokens=st.lists(st.integers(0, 64), min_size=1, max_size=11),
    spare=st.integers(0, 2),
    page=st.sampled_from([16, 64]),
    seed=st.integers(0, 99),
)
def test_copies(tokens: list[int], spare: int, page: int, seed: int) -> None:
    """More entries than semaphores, and fewer; entries behind the count point anywhere."""
    cache, order = cache_of(seed, page), np.random.default_rng(seed).permutation(PAGES)
    sources, targets = (ints(*held[: len(tokens) + spare]) for held in (order, order[::-1]))
    lengths = ints(*(min(count, page) for count in tokens), *[page] * spare)
    args = (cache, sources, targets, lengths, ints(len(tokens)))
    same(tpu_pages.copy_pages(*args, interpret=interpret()), tpu_pages.copy_pages_reference(*args))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(count=st.integers(0, 12), seed=st.integers(0, 99))
def test_gathered_and_scattered(count: int, seed: int) -> None:
    """What is gathered is contiguous; scattered into another cache it lies where it is told, and nothing else moves."""
    cache, other = cache_of(seed), cache_of(seed + 100)
    pages = ints(*np.random.default_rng(seed).permutation(PAGES)[:12])
    staging = tpu_pages.gather_pages(cache, pages, ints(count), interpret=interpret())
    same(staging[:count], tpu_pages.gather_pages_reference(cache, pages)[:count])
    wanted = tpu_pages.scatter_pages_reference(other, staging, pages, ints(count))
    same(tpu_pages.scatter_pages(other, staging, pages, ints(count), interpret=interpret()), wanted)


def test_a_target_that_is_a_source_is_found() -> None:
    """The detector is awake: a copy that reads what another one writes is reported."""
    args = (cache_of(0), ints(1, 2), ints(2, 3), ints(64, 64), ints(2))
    tpu_pages.copy_pages(*args, interpret=interpret("eager"))
    assert interpreter.races.races_found


@pytest.mark.parametrize("page", [48, 40])
def test_other_pages_are_refused(page: int) -> None:
    with pytest.raises(ValueError, match=f"a page of {page} tokens is not 16 times a power of two"):
        tpu_pages.copy_pages(cache_of(0, page), ints(1), ints(2), ints(8), ints(1), interpret=interpret())


def test_other_staging_is_refused() -> None:
    with pytest.raises(ValueError, match=r"staging .* is wanted"):
        tpu_pages.scatter_pages(cache_of(0), jnp.zeros((1, 2, 2, 64, 128)), ints(1), ints(1), interpret=interpret())
