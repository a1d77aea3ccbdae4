"""Ragged paged attention on the CPU as one C++ call a layer (csrc/cpu_attention.cc), through jax.ffi.

The library is prebuilt and optional: without it, or on another processor family, dispatch takes the plain kernel.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import Array

from pallas_kernels.cpu_library import library

TARGET = "twinfer_cpu_attention"
MAX_HEAD_SIZE = 256


def available(head_size: int) -> bool:
    """Whether the library is there and takes heads of this size."""
    return head_size % 16 == 0 and head_size <= MAX_HEAD_SIZE and library() is not None


def paged_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: Array,
    layer_index: int,
    *,
    page_table: Array,
    query_starts: Array,
    num_new: Array,
    num_computed: Array,
    num_rows: Array,
    write_page: Array,
    write_offset: Array,
    decode_order: Array,
    tile_rows: Array,
    tile_starts: Array,
    num_tiles: Array,
    scale: float,
    window: int | None,
    logit_cap: float | None,
) -> tuple[Array, Array]:
    """Arguments as dispatch.paged_attention and dispatch.Work have them; the kernel makes its own work list."""
    del decode_order, tile_rows, tile_starts, num_tiles
    q = q.astype(k.dtype)
    call = jax.ffi.ffi_call(
        TARGET,
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(cache.shape, cache.dtype)),
        input_output_aliases={3: 1},
    )
    out, cache = call(
        q,
        k,
        v,
        cache,
        page_table,
        query_starts,
        num_new,
        num_computed,
        num_rows.reshape(1),
        write_page,
        write_offset,
        layer=np.int64(layer_index),
        window=np.int64(window or 0),
        scale=np.float32(scale),
        logit_cap=np.float32(logit_cap or 0.0),
    )
    return out, cache
