"""The C++ products of the CPU equal numpy's, at every row count and at sizes that are no multiple of anything."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu_linear, dispatch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 48), (7, 13), (1, 1), (501, 130), (26, 512)], ids=str)
def test_equals_numpy(shape: tuple[int, int], dtype: str) -> None:
    rng = np.random.default_rng(shape[0])
    weight = jnp.asarray(rng.standard_normal(shape), dtype)
    for rows in (*range(1, 10), 16, 33):
        x = jnp.asarray(rng.standard_normal((rows, shape[1])), dtype)
        wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        got = np.asarray(cpu_linear.linear(x, weight))
        np.testing.assert_allclose(got, wanted, atol=1e-5 * shape[1] ** 0.5)
        np.testing.assert_allclose(np.asarray(dispatch.linear_f32(x, weight)), wanted, atol=1e-5 * shape[1] ** 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 48), (7, 13), (1, 1), (501, 130), (26, 512)], ids=str)
def test_codes(shape: tuple[int, int], dtype: str) -> None:
    """int8 weights, all of their range, as they lie."""
    rng = np.random.default_rng(shape[0])
    weight = rng.integers(-128, 128, shape, np.int8)
    for rows in (*range(1, 10), 16):
        x = jnp.asarray(rng.standard_normal((rows, shape[1])), dtype)
        wanted = np.asarray(x, np.float64) @ weight.astype(np.float64).T
        got = np.asarray(cpu_linear.linear(x, jnp.asarray(weight)))
        np.testing.assert_allclose(got, wanted, atol=1e-5 * 128 * shape[1] ** 0.5)


def test_is_chosen_for_few_rows_alone() -> None:
    weight = jnp.zeros((8, 16))
    assert cpu_linear.available(jnp.zeros((1, 16)), weight)
    assert not cpu_linear.available(jnp.zeros((64, 16)), weight)
    assert cpu_linear.available(jnp.zeros((1, 16)), weight.astype(jnp.int8))
    assert not cpu_linear.available(jnp.zeros((1, 16), jnp.int8), weight.astype(jnp.int8))
