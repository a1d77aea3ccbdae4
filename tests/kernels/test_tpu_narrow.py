"""KV pages of 8 bits: how tokens are rounded, and whole steps against pages of bfloat16 that hold the same numbers."""

from __future__ import annotations

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, tpu_attention
from pallas_kernels.dispatch import Work
from pallas_kernels.int8_pages import Cache, Int8Pages
from pallas_kernels.tpu_narrow import repeated_bytes, round_tokens
from tests.kernels.narrow_pages import numbers, numbers_of_tokens, rounded

KV_HEADS, GROUP, SIZE, PAGES = 2, 2, 64, 9
EMPTY = Int8Pages(codes=jnp.zeros(0, jnp.int8), scales=jnp.zeros(0, jnp.bfloat16))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), exponent=st.integers(-30, 30))
def test_int8_is_the_nearest_code(seed: int, exponent: int) -> None:
    x = np.random.default_rng(seed).normal(size=(2, 5, KV_HEADS, SIZE)).astype(np.float32) * 2.0**exponent
    k, v, scales = round_tokens(jnp.asarray(x[0]), jnp.asarray(x[1]), EMPTY)
    found = numbers_of_tokens(k, v, scales)
    steps = np.asarray(scales, np.float32).reshape(5, KV_HEADS, 2)
    for part in (0, 1):
        step = np.repeat(steps[:, :, part], SIZE, axis=1)
        assert (np.abs(found[part] - x[part].reshape(5, -1)) <= 0.5001 * step).all()
        assert (steps[:, :, part] <= np.abs(x[part]).max(-1) / 127 * 1.01 + 1e-12).all()


def test_fp8_saturates() -> None:
    x = jnp.array([[[1e6, -1e6, 0.3, 0.0]]])
    k, _, scales = round_tokens(x, x, jnp.zeros(0, jnp.float8_e4m3fn))
    assert scales is None and np.asarray(k, np.float32).tolist() == [[448.0, -448.0, 0.3125, 0.0]]


def test_bytes_are_repeated() -> None:
    words = repeated_bytes(jnp.array([[1, -2]], jnp.int8))
    assert np.asarray(words).view(np.int8).reshape(1, 2, 4).tolist() == [[[1] * 4, [-2] * 4]]


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_a_step_of_all_kinds_of_rows(form: str) -> None:
    """A prompt, a chunk behind a prefix, two decoding rows: as with bfloat16 pages of the same numbers."""
    rng = np.random.default_rng(7)
    before, new = np.array([0, 130, 40, 255]), np.array([40, 60, 1, 1])
    tokens = int(new.sum())
    starts = np.cumsum(new) - new
    table = np.zeros((4, 3), np.int32)
    table[:, :2] = rng.permutation(np.arange(1, PAGES)).reshape(4, 2)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    q, k, v = normal(tokens, KV_HEADS * GROUP, SIZE), normal(tokens, KV_HEADS, SIZE), normal(tokens, KV_HEADS, SIZE)
    cache = rounded(normal(*tpu_attention.cache_shape(1, PAGES, 128, KV_HEADS, SIZE)), KV_HEADS, SIZE, form)
    wide = jnp.asarray(numbers(cache), jnp.bfloat16)
    held = (x.reshape(k.shape) for x in numbers_of_tokens(*round_tokens(k, v, cache)))
    found, changed = step(q, k, v, cache, table, starts, new, before)
    wanted, other = step(q, *(jnp.asarray(x, jnp.bfloat16) for x in held), wide, table, starts, new, before)
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), atol=4e-2)
    # products of codes and scales have more bits than bfloat16
    np.testing.assert_allclose(numbers(changed), numbers(other), rtol=2**-8)


def step(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache, *rows: np.ndarray) -> tuple[jax.Array, Cache]:
    table, starts, new, before = (jnp.asarray(x, jnp.int32) for x in rows)
    nothing = jnp.zeros(1, jnp.int32)
    told = {
        "kernel": "tpu_interpreted", "page_tokens": 128, "num_rows": jnp.int32(4), "page_table": table,
        "query_starts": starts, "num_new": new, "num_computed": before,
    }  # fmt: skip
    unused = {field.name: nothing for field in fields(Work) if field.name not in {*told, "lists"}}
    work = dispatch.make_lists(Work(**told, **unused), q.shape[0], None)
    return dispatch.paged_attention(q, k, v, cache, 0, work, scale=SIZE**-0.5)


def test_shapes_of_int8_pages() -> None:
    pages = tpu_attention.int8_pages(2, 5, 128, 4, 80)
    assert pages.codes.shape == (2, 5, 2, 128, 320) and pages.scales.shape == (2, 5, 8, 128)
    assert dispatch.cache_dtype("fp8_e4m3", "tpu") == jnp.float8_e4m3fn
