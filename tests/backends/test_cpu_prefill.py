"""The C++ attention of many query tokens equals dense attention, in every build that this processor can run."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu_attention
from tests.backends.test_cpu_attention import ROWS, dense, make_case
from tests.backends.test_cpu_gemm import isa

__all__ = ["isa"]
SHAPES = [(8, 4, 64, 64), (4, 1, 128, 32), (3, 3, 16, 16), (40, 1, 32, 64), (4, 2, 80, 24), (2, 2, 256, 16)]


@pytest.mark.parametrize(("window", "cap"), [(None, None), (20, None), (70, 30.0)])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "bfloat16 over float32", "float32 over bfloat16"])
def test_equals_dense(isa: str, dtypes: str, window: int | None, cap: float | None) -> None:
    dtype, _, cache_dtype = dtypes.partition(" over ")
    for shape in SHAPES:
        (q, k, v, cache), work = make_case(*shape, cache_dtype or dtype)
        q, k, v = (jnp.asarray(array, dtype) for array in (q, k, v))
        if cache_dtype == "bfloat16":  # keys and values that the cache holds exactly
            k, v = (array.astype("bfloat16").astype(dtype) for array in (k, v))
        tokens = sum(new for _, new in ROWS)
        expected = dense([q, k, v, cache], work, window, cap)[:tokens]
        options = {"scale": shape[2] ** -0.5, "window": window, "logit_cap": cap}
        ours, _ = cpu_attention.paged_attention(q, k, v, cache, 1, **options, **work)
        error = np.abs(np.asarray(ours, np.float32)[:tokens] - expected).max()
        assert error < (1e-5 if dtype == "float32" else 2e-2), shape
