"""Products of many rows with [out, in] bfloat16 weights on the CPU, in C++ (csrc/cpu_gemm.cc), through jax.ffi.

Taken where the processor multiplies bfloat16 well (AMX; AVX512_BF16 on AMD): sums stay float32, the result is rounded
once and written as bfloat16, where XLA:CPU writes float32 and converts it. Elsewhere XLA multiplies.
Letters: M rows of x · K in · N out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.cpu_library import library

TARGET = "twinfer_cpu_gemm"
MIN_ROWS = 24
LEAST_ISA = 3  # csrc/cpu_isa.h: AVX512_BF16


def available(x: Array, weight: Array) -> bool:
    """Whether the library is there and the better choice. x: [M, K]; weight: [N, K]."""
    if x.dtype != jnp.bfloat16 or weight.dtype != jnp.bfloat16 or x.shape[0] < MIN_ROWS:
        return False
    loaded = library()
    return loaded is not None and loaded.twinfer_cpu_isa() >= LEAST_ISA


def gemm(x: Array, weight: Array, dtype: jax.typing.DTypeLike) -> Array:
    """x @ weight.T, [M, N] of dtype float32 or bfloat16. x: bf16 [M, K]; weight: bf16 [N, K]."""
    if library() is None:
        raise FileNotFoundError("no prebuilt library of CPU kernels for this machine")
    return jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), dtype))(x, weight)
