"""Pages of the KV cache on a TPU, moved by DMA alone: copied within the cache, gathered for a transfer, scattered back.

One descriptor moves a page of all layers, keys and values; IN_FLIGHT of them are under way at once, nothing passes
through VMEM. Lists are as long as the program was compiled for, their true length is read on the device. Nothing in the
engine calls this yet. Written without ref.reshape and ref.bitcast, so that it runs in Pallas's interpreter with its
race detector. Letters: L layers · P pages · W lanes of a token (heads times head size) · C entries of a list.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

IN_FLIGHT = 8
TILE = 16  # tokens that lie together: packed rows of bfloat16
INTERPRET = pltpu.InterpretParams | bool


def copy_pages(
    cache: Array,
    sources: Array,
    targets: Array,
    tokens: Array,
    count: Array,
    *,
    interpret: INTERPRET = False,
    name: str = "copy_pages",
) -> Array:
    """The cache with the first tokens of pages copied to other pages. cache: [L, P, 2, page, W], donated.

    sources, targets, tokens: i32 [C]; count: i32 [1], entries from it on are not looked at. Whole tiles of 16 tokens
    are copied, so up to 15 more than asked. No page is a target twice, or a target and a source: copies overtake each
    other. Raises ValueError for a page that is not 16 tokens times a power of two.
    """
    page = cache.shape[3]
    tiles = page // TILE
    if page % TILE or tiles & (tiles - 1):
        raise ValueError(f"cache {cache.shape}: a page of {page} tokens is not {TILE} times a power of two")
    return move(copy_kernel, (count, sources, targets, tokens), (cache,), cache, 0, interpret, name)


def gather_pages(
    cache: Array, pages: Array, count: Array, *, interpret: INTERPRET = False, name: str = "gather_pages"
) -> Array:
    """[C, L, 2, page, W]: pages one behind the other, each contiguous; what is from count on is not written.

    cache: [L, P, 2, page, W]; pages: i32 [C]; count: i32 [1].
    """
    layers, _, two, page, width = cache.shape
    staging = jax.ShapeDtypeStruct((pages.shape[0], layers, two, page, width), cache.dtype)
    return move(gather_kernel, (count, pages), (cache,), staging, None, interpret, name)


def scatter_pages(
    cache: Array, staging: Array, pages: Array, count: Array, *,
    interpret: INTERPRET = False, name: str = "scatter_pages",
) -> Array:  # fmt: skip
    """The cache with pages of gather_pages' form put where `pages` says, none twice. cache: donated."""
    wanted = (pages.shape[0], cache.shape[0], *cache.shape[2:])
    if staging.shape != wanted or staging.dtype != cache.dtype:
        raise ValueError(f"staging {staging.shape} {staging.dtype}: {wanted} of {cache.dtype} is wanted")
    return move(scatter_kernel, (count, pages), (staging, cache), cache, 1, interpret, name)


def move(body: Any, scalars: Any, arrays: Any, out: Any, aliased: Any, interpret: Any, name: Any) -> Any:
    """One program over arrays that stay in HBM. aliased: which of them the output is."""
    there = pl.BlockSpec(memory_space=pl.ANY)
    result: Array = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[there] * len(arrays),
            out_specs=there,
            scratch_shapes=[pltpu.SemaphoreType.DMA((IN_FLIGHT,))],
        ),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={} if aliased is None else {len(scalars) + aliased: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name=name,
    )(*scalars, *arrays)
    return result


def copy_kernel(count: Any, sources: Any, targets: Any, tokens: Any, _: Any, cache: Any, done: Any) -> None:
    """A page's tiles go as powers of two of them: all layers in at most log2(tiles) + 1 descriptors."""
    tiles = cache.shape[3] // TILE

    def each(entry: Any, slot: Any, act: Any) -> None:
        wanted = lax.div(tokens[entry] + TILE - 1, TILE)
        size = tiles
        while size:
            first = pl.multiple_of((wanted & ~(2 * size - 1)) * TILE, TILE)
            part = (slice(None), pl.ds(first, size * TILE), slice(None))
            source, target = (cache.at[(slice(None), ids[entry], *part)] for ids in (sources, targets))
            copy = pltpu.make_async_copy(source, target, done.at[slot])
            pl.when(wanted & size != 0)(functools.partial(act, copy))
            size //= 2

    several(count[0], each)


def gather_kernel(count: Any, pages: Any, cache: Any, staging: Any, done: Any) -> None:
    def each(entry: Any, slot: Any, act: Any) -> None:
        act(pltpu.make_async_copy(cache.at[:, pages[entry]], staging.at[entry], done.at[slot]))

    several(count[0], each)


def scatter_kernel(count: Any, pages: Any, staging: Any, _: Any, cache: Any, done: Any) -> None:
    def each(entry: Any, slot: Any, act: Any) -> None:
        act(pltpu.make_async_copy(staging.at[entry], cache.at[:, pages[entry]], done.at[slot]))

    several(count[0], each)


def several(count: Any, each: Any) -> None:
    """Starts every entry's transfers, and waits for those of the entry that had the same semaphore."""

    def turn(entry: Any, _: Any) -> Any:
        slot = lax.rem(entry, IN_FLIGHT)

        @pl.when(entry >= IN_FLIGHT)
        def _() -> None:
            each(entry - IN_FLIGHT, slot, lambda copy: copy.wait())

        @pl.when(entry < count)
        def _() -> None:
            each(entry, slot, lambda copy: copy.start())

        return 0

    lax.fori_loop(0, jnp.where(count > 0, count + IN_FLIGHT, 0), turn, 0)


def copy_pages_reference(cache: Array, sources: Array, targets: Array, tokens: Array, count: Array) -> Array:
    """The same, one entry after another."""
    place = jnp.arange(cache.shape[3])[None, None, :, None]

    def copy(entry: Array, cache: Array) -> Array:
        whole = -(-tokens[entry] // TILE) * TILE
        old = cache[:, targets[entry]]
        return cache.at[:, targets[entry]].set(jnp.where(place < whole, cache[:, sources[entry]], old))

    return lax.fori_loop(0, count[0], copy, cache)


def gather_pages_reference(cache: Array, pages: Array) -> Array:
    """With entries behind the count as well."""
    return jnp.moveaxis(cache[:, pages], 1, 0)


def scatter_pages_reference(cache: Array, staging: Array, pages: Array, count: Array) -> Array:
    return lax.fori_loop(0, count[0], lambda n, cache: cache.at[:, pages[n]].set(staging[n]), cache)
