"""KV pages of 8 bits on a TPU: their forms, how keys and values are rounded to them, and the kernels' parts for them.

The cache's type tells the form: an array of float8_e4m3fn holds what it holds, saturated, with no scale (as the torch
backend's fp8 pages); Int8Pages holds codes of one byte and a scale for every token and head. A page's scales lie with
the tokens in the lanes, so they come as one small copy beside the page's wide one, and meet scores as they lie. Scales
are bfloat16: a product with ones and zeros moves them exactly.
Letters: T tokens · K KV heads · H head size · W = K * H · L layers · P pages.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.int8_pages import Cache, Int8Pages, rounded

E4M3_MAX = 448.0
LANES = 128  # of a vector register


def round_tokens(k: Array, v: Array, cache: Cache) -> tuple[Array, Array, Array | None]:
    """k and v as the cache keeps them, [T, W] twice, and bf16 [T, 2 * K] scales of Int8Pages.

    k, v: [T, K, H], finite.
    """
    flat = (k.shape[0], k.shape[1] * k.shape[2])
    if not isinstance(cache, Int8Pages):
        limit = E4M3_MAX if cache.dtype == jnp.float8_e4m3fn else None  # e4m3 has no infinity: saturate
        clipped = (x if limit is None else jnp.clip(x, -limit, limit) for x in (k, v))
        k, v = (x.astype(cache.dtype).reshape(flat) for x in clipped)
        return k, v, None
    (keys, of_keys), (values, of_values) = rounded(k), rounded(v)
    scales = jnp.stack((of_keys, of_values), axis=2).reshape(k.shape[0], -1)
    return keys.reshape(flat), values.reshape(flat), scales


def repeated_bytes(x: Array) -> Array:
    """i32 of x's shape: each byte four times. x: any type of one byte."""
    return lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.int32) * jnp.int32(0x01010101)


def check_scales(cache: Cache, new_scales: Array | None, shape: tuple[int, int]) -> None:
    """Raises ValueError unless there are new scales of the shape with Int8Pages, and none with other caches."""
    if (None if new_scales is None else new_scales.shape) != (shape if isinstance(cache, Int8Pages) else None):
        raise ValueError(f"Int8Pages, and nothing else, come with new scales bf16 {list(shape)}")


# Parts of the prefill kernel, on values and references inside it.


def moved_rows(fresh: Any, is_origin: Any, inside: Any, old: Any) -> Any:
    """[page, W]: where `inside`, the row of `fresh` that `is_origin` [page, rows] names, elsewhere that of `old`."""
    if old.dtype.itemsize > 1:
        shift = jnp.where(is_origin, 1.0, 0.0).astype(fresh.dtype)
        moved = lax.dot(shift, fresh, preferred_element_type=jnp.float32).astype(old.dtype)
        return jnp.where(inside, moved, old)
    shift = jnp.where(is_origin, 1, 0).astype(jnp.int8)
    moved = lax.dot(shift, pltpu.bitcast(fresh, jnp.int8), preferred_element_type=jnp.int32)
    kept = pltpu.bitcast(old, jnp.int8).astype(jnp.int32)
    return pltpu.bitcast(jnp.where(inside, moved, kept).astype(jnp.int8), old.dtype)


def widened(keys: Any, values: Any, scales: Any, dtype: Any) -> tuple[Any, Any]:
    """A KV head's numbers [block, H] twice. scales: f32 [block, 2] of keys and values, None without."""
    if scales is None:
        return keys.astype(dtype), values.astype(dtype)
    both = (codes.astype(jnp.float32) * scales[:, part : part + 1] for part, codes in enumerate((keys, values)))
    keys, values = (x.astype(dtype) for x in both)
    return keys, values


def write_scales(new: Any, target: Any, held: Any, semaphore: Any, source: Any, begin: Any, end: Any) -> None:
    """The scales of tokens [begin, end) of a page become those of the step's tokens from source + begin on.

    new: bf16 [2 * K, T + LANES] of the step's tokens; target: bf16 [2 * K, page] in HBM; held: the same in VMEM.
    """
    low = pl.multiple_of(lax.div(source + begin, LANES) * LANES, LANES)
    old = pltpu.make_async_copy(target, held, semaphore)
    old.start()
    old.wait()
    origin, to = (lax.broadcasted_iota(jnp.int32, (2 * LANES, held.shape[1]), axis) for axis in (0, 1))
    shift = jnp.where(to + (source - low) == origin, 1.0, 0.0).astype(held.dtype)
    moved = lax.dot(new[:, pl.ds(low, 2 * LANES)], shift, preferred_element_type=jnp.float32)
    token = lax.broadcasted_iota(jnp.int32, held.shape, 1)
    kept = held[...].astype(jnp.float32)
    held[...] = jnp.where((token >= begin) & (token < end), moved, kept).astype(held.dtype)
    back = pltpu.make_async_copy(held, target, semaphore)
    back.start()
    back.wait()
