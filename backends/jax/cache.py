"""The KV cache on the device: one array a pool, donated from program to program, and copies between its pages.

Letters: L layers of the pool · P pages · K KV heads · H head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from backends.jax.split import AXIS, Split
from engine.specs.cache import CacheLayout
from pallas_kernels import dispatch

COPIES = 8
"""Page copies of one call of the copy program."""


def cache_shapes(layout: CacheLayout, split: Split) -> list[jax.ShapeDtypeStruct]:
    """One array a pool, as dispatch lays it out, the ranks' heads one after another. A pool tells its rank's heads."""
    found = []
    for pool in layout.pools:
        kernel = dispatch.kernel_for(split.platform, pool.head_size, layout.kv_dtype)
        heads = pool.num_kv_heads * split.size
        shape = dispatch.cache_shape(kernel, pool.num_layers, pool.num_pages, pool.page_tokens, heads, pool.head_size)
        axis = dispatch.cache_heads_axis(kernel)
        spec = PartitionSpec(*(AXIS if n == axis else None for n in range(len(shape))))
        found.append(split.shape(shape, dispatch.cache_dtype(layout.kv_dtype, split.platform), spec))
    return found


def copy_pages(cache: Array, copies: Array) -> Array:
    """Copy the first tokens of pages, in all layers. copies: i32 [3, COPIES] source, target, tokens (0 pads).

    cache: [L, P, ..., page, lanes], as dispatch.cache_shape says.
    """
    shape = (cache.shape[0], 1, *cache.shape[2:])
    start = (0,) * (cache.ndim - 2)

    def copy(index: Array, cache: Array) -> Array:
        source, target, tokens = copies[0, index], copies[1, index], copies[2, index]
        new = lax.dynamic_slice(cache, (0, source, *start), shape)
        old = lax.dynamic_slice(cache, (0, target, *start), shape)
        kept = jnp.arange(shape[-2])[:, None] < tokens
        return lax.dynamic_update_slice(cache, jnp.where(kept, new, old), (0, target, *start))

    return lax.fori_loop(0, COPIES, copy, cache)
