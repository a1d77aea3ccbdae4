"""Products of a few rows with [out, in] weights on the CPU, in C++ (csrc/cpu_linear.cc), through jax.ffi.

XLA:CPU leaves half or more of the memory bandwidth unused below some sixteen rows (in bfloat16 it turns the weights
around first, and a single row takes ten times as long as two); above, its products are the better ones.
Letters: M rows of x · K in · N out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.cpu_library import library

TARGET = "twinfer_cpu_linear"
MAX_ROWS = 16
DTYPES = ("float32", "bfloat16")


def available(x: Array, weight: Array) -> bool:
    """Whether the library is there and the better choice. x: [M, K]; weight: [N, K], int8 too."""
    few = x.shape[0] <= MAX_ROWS and x.dtype.name in DTYPES and weight.dtype.name in (*DTYPES, "int8")
    return few and library() is not None


def linear(x: Array, weight: Array) -> Array:
    """x @ weight.T, f32 [M, N]. x: [M, K]; weight: [N, K]."""
    if library() is None:
        raise FileNotFoundError("no prebuilt library of CPU kernels for this machine")
    return jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32))(x, weight)
