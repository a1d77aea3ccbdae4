"""The C++ products of many bfloat16 rows equal float64's, in every build that this processor can run."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu_gemm, cpu_library, dispatch

ISAS = ("base", "v3", "v4", "bf16", "amx")
SHAPES = [(64, 48), (7, 13), (1, 1), (501, 130), (26, 512), (129, 33), (33, 96), (300, 1408)]  # out, in


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """A build that products of many rows and prefills take during a test; skipped where it cannot run."""
    loaded = cpu_library.library()
    if loaded is None:
        pytest.fail("the prebuilt library does not load on this machine")
    if not loaded.twinfer_cpu_force_isa(ISAS.index(request.param)):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    loaded.twinfer_cpu_force_isa(-1)


def test_equals_float64(isa: str) -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        weight = jnp.asarray(rng.standard_normal(shape), "bfloat16")
        for rows in (1, 2, 24, 31, 32, 33, *rng.integers(34, 601, 3)):
            x = jnp.asarray(rng.standard_normal((rows, shape[1])), "bfloat16")
            wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
            wide, narrow = (cpu_gemm.gemm(x, weight, dtype) for dtype in (jnp.float32, jnp.bfloat16))
            assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
            np.testing.assert_allclose(np.asarray(wide), wanted, atol=1e-5 * shape[1] ** 0.5)
            np.testing.assert_array_equal(np.asarray(narrow), np.asarray(wide.astype(jnp.bfloat16)))


def test_infinities_and_nan_stay_in_their_rows(isa: str) -> None:
    rng = np.random.default_rng(1)
    x, weight = (rng.standard_normal(shape) for shape in ((40, 50), (70, 50)))
    x[3, 7], x[39, 49] = np.nan, np.inf
    out = np.asarray(cpu_gemm.gemm(jnp.asarray(x, "bfloat16"), jnp.asarray(weight, "bfloat16"), jnp.bfloat16))
    finite = np.isfinite(out.astype(np.float32))
    assert np.isnan(out[3].astype(np.float32)).all() and np.isinf(out[39].astype(np.float32)).all()
    assert finite[[row for row in range(40) if row not in (3, 39)]].all()


def test_a_model_takes_it_for_many_bfloat16_rows_alone() -> None:
    loaded = cpu_library.library()
    assert loaded is not None
    pays = loaded.twinfer_cpu_isa() >= cpu_gemm.LEAST_ISA
    weight = jnp.ones((8, 16), "bfloat16")

    def calls(rows: int, weight: jax.Array) -> bool:
        program = jax.jit(dispatch.linear).lower(jnp.ones((rows, 16), weight.dtype), weight)
        return cpu_gemm.TARGET in program.as_text()

    assert calls(200, weight) == pays
    assert not calls(1, weight)
    assert not calls(200, weight.astype("float32"))
