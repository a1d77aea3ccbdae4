"""The KV cache on the device: an array a pool, or codes and scales, donated from program to program, and page copies.

Letters: L layers of the pool · P pages · K KV heads · H head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from backends.jax.split import AXIS, Split
from engine.specs.cache import CacheLayout
from pallas_kernels import dispatch
from pallas_kernels.int8_pages import Cache, Int8Pages, joined

COPIES = 8
"""Page copies of one call of the copy program."""


def cache_shapes(layout: CacheLayout, split: Split) -> list[Any]:
    """The shapes of a Cache a pool, as dispatch lays it out, the ranks' heads one after another.

    A pool tells its rank's heads.
    """
    found = []
    for pool in layout.pools:
        arrays = dispatch.cache_arrays(
            split.platform,
            layout.kv_dtype,
            num_layers=pool.num_layers,
            num_pages=pool.num_pages,
            page_tokens=pool.page_tokens,
            num_kv_heads=pool.num_kv_heads * split.size,
            head_size=pool.head_size,
        )
        shapes = (split.shape(x.shape, x.dtype, PartitionSpec(*[None] * x.heads_axis, AXIS)) for x in arrays)
        found.append(joined(tuple(shapes)))  # type: ignore[arg-type]
    return found


def shardings(caches: Any) -> Any:
    """Where each array of a tree of shapes lies."""
    return jax.tree_util.tree_map(lambda shape: shape.sharding, caches)


def copy_pages(cache: Cache, copies: Array) -> Cache:
    """Copy the first tokens of pages, in all layers. copies: i32 [3, COPIES] source, target, tokens (0 pads)."""
    if not isinstance(cache, Int8Pages):
        return copy_array(cache, copies)
    return Int8Pages(
        codes=copy_array(cache.codes, copies),
        scales=copy_array(cache.scales[..., None], copies)[..., 0],
    )


def copy_array(cache: Array, copies: Array) -> Array:
    """As copy_pages. cache: [L, P, ..., page, lanes]."""
    shape = (cache.shape[0], 1, *cache.shape[2:])
    start = (0,) * (cache.ndim - 2)

    def copy(index: Array, cache: Array) -> Array:
        source, target, tokens = copies[0, index], copies[1, index], copies[2, index]
        new = lax.dynamic_slice(cache, (0, source, *start), shape)
        old = lax.dynamic_slice(cache, (0, target, *start), shape)
        kept = jnp.arange(shape[-2])[:, None] < tokens
        return lax.dynamic_update_slice(cache, jnp.where(kept, new, old), (0, target, *start))

    return lax.fori_loop(0, COPIES, copy, cache)
