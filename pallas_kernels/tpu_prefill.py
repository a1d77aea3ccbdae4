"""Attention of rows with several new tokens on a TPU: cache write, scores, softmax and sums, one Pallas kernel a layer.

The step's tokens are cut into tiles at multiples of TILE, whatever rows they belong to, so that every tile lies where
registers do; a list of (tile, row) pairs says what to attend to, and a tile of several rows sums them one after
another, each query masked from rows that are not its own. Scores are held keys by queries: the softmax reduces along
sublanes, which costs vector additions and no lane crossing. First each touched page takes its new tokens: a copy from
HBM to HBM where a whole page lies on a boundary of 16 tokens, otherwise through a product with a matrix of zeros and
ones that shifts rows, exactly. Lengths are read on the device. Written without ref.reshape and ref.bitcast, so that it
runs in Pallas's interpreter with its race detector. Source of the softmax over blocks: Dao et al., FlashAttention
(arXiv 2205.14135).
Letters: T tokens · S rows · N query heads · K KV heads · H head size · W = K * H · L layers · P pages · B listed pages.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_decode import LANES, MASKED

TILE = 128  # queries of a tile
SUBLANES = 16  # rows of packed bfloat16 that are copied together
BLOCK_PAGES = 2  # pages attended to at once
FLOOR = -1e29  # where a running maximum begins: above MASKED, so that a block of masked keys weighs nothing
LOG2_E = 1.4426950408889634


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """What to do, pairs in order of tiles; entries from a count on are not looked at. Rows of no prefill: new 0."""

    num_pairs: Array  # i32 [1]
    pair_tiles: Array  # i32 [pairs]
    pair_rows: Array  # i32 [pairs]
    num_writes: Array  # i32 [1] pages that take new tokens
    write_rows: Array  # i32 [writes]
    write_columns: Array  # i32 [writes] index of the page in its row
    query_starts: Array  # i32 [S] a row's first token in the step
    num_new: Array  # i32 [S]
    num_computed: Array  # i32 [S] tokens in the cache before
    page_starts: Array  # i32 [S] a row's first entry in `pages`
    pages: Array  # i32 [B], BLOCK_PAGES - 1 entries at the end are never a row's


def prefill_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: Array,
    layer: Array,
    tiles: Tiles,
    *,
    scale: float,
    size: int,
    window: int | None = None,
    logit_cap: float | None = None,
    sinks: Array | None = None,
    interpret: pltpu.InterpretParams | bool = False,
    name: str = "prefill_attention",
) -> tuple[Array, Array]:
    """Write the listed pages' new keys and values, then attend -> ([T, N * H] of q's dtype, cache).

    q: [T, N * H]; k, v: [T, W] of the cache's dtype, finite; T: a multiple of TILE; cache: [L, P, 2, page, W], donated;
    layer: i32 [1]; size: H. Tiles of no pair are left as they are, tokens of no listed row are 0. window: keys that are
    seen, a query's own included; sinks: f32 [N]. Raises ValueError for shapes that do not fit.
    """
    tokens, lanes = q.shape
    page, width = cache.shape[3:]
    heads, kv_heads = lanes // size, width // size
    if page != LANES or tokens % TILE or lanes % size or width % size or heads % kv_heads:
        raise ValueError(f"q {q.shape} of heads of {size} does not fit a cache {cache.shape}")
    if k.shape != (tokens, width) or v.shape != k.shape or k.dtype != cache.dtype:
        raise ValueError(f"k {k.shape} {k.dtype}, v {v.shape}: ({tokens}, {width}) {cache.dtype} is wanted")
    there, here = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)
    scalars = [getattr(tiles, field) for field in Tiles.__slots__]
    body = functools.partial(
        prefill_kernel,
        size=size,
        scale=scale,
        window=window,
        logit_cap=logit_cap,
        has_sinks=sinks is not None,
    )
    block = BLOCK_PAGES * page
    column = (heads, 1, TILE)
    sinks = jnp.zeros((heads,), jnp.float32) if sinks is None else sinks.astype(jnp.float32) * LOG2_E
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(scalars),
            grid=(1,),
            in_specs=[here, there, there, there, there],
            out_specs=[there, there],
            scratch_shapes=[
                pltpu.VMEM((TILE, lanes), q.dtype),
                pltpu.VMEM((TILE, lanes), q.dtype),
                pltpu.VMEM((2, 2, block, width), cache.dtype),
                pltpu.VMEM((heads, size, TILE), jnp.float32),
                pltpu.VMEM(column, jnp.float32),
                pltpu.VMEM(column, jnp.float32),
                pltpu.VMEM((2, page + SUBLANES, width), cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(cache.shape, cache.dtype)],
        input_output_aliases={1 + len(scalars) + 4: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=48 << 20),
        interpret=interpret,
        name=name,
    )(layer, *scalars, jnp.broadcast_to(sinks[:, None, None], column), q, k, v, cache)


def prefill_kernel(  # type: ignore[no-untyped-def]
    layer, num_pairs, pair_tiles, pair_rows, num_writes, write_rows, write_columns,
    query_starts, num_new, num_computed, page_starts, pages,  # scalars
    sinks, q, k, v, _, out, cache,  # [N, 1, TILE]; the rest in HBM
    queries, results,  # [TILE, N * H] of the tile
    held,  # [2, 2, block, W] two blocks: one attended to, one on its way
    total, top, weight,  # [N, H, TILE], [N, 1, TILE] twice: of the tile so far
    fresh,  # [2, page + SUBLANES, W] new keys and values of a page
    read, moved, written,  # semaphores
    *, size, scale, window, logit_cap, has_sinks,
):  # fmt: skip
    """One program: the loop over written pages, then that over pairs and their blocks."""
    block, width = held.shape[2:]
    page, heads, kv_heads = block // BLOCK_PAGES, queries.shape[1] // size, width // size
    at = layer[0]

    fresh[...] = jnp.zeros(fresh.shape, fresh.dtype)  # what no copy has filled is multiplied by zero: not by NaN

    def write(n, _):
        row = write_rows[n]
        first = write_columns[n] * page  # position of the page's first token
        source = query_starts[row] + first - num_computed[row]  # that token in the step; may be before it
        begin = jnp.maximum(num_computed[row] - first, 0)
        end = jnp.minimum(num_computed[row] + num_new[row] - first, page)
        target = cache.at[at, pages[page_starts[row] + write_columns[n]]]
        whole = (begin == 0) & (end == page) & (lax.rem(source, SUBLANES) == 0)

        @pl.when(whole)
        def _():
            start = pl.multiple_of(jnp.maximum(source, 0), SUBLANES)
            copies = [
                pltpu.make_async_copy(new.at[pl.ds(start, page), :], target.at[part], moved)
                for part, new in enumerate((k, v))
            ]
            for copy in copies:
                copy.start()
            for copy in copies:
                copy.wait()

        @pl.when(jnp.logical_not(whole) & (end > begin))
        def _():
            low = lax.div(source + begin, SUBLANES) * SUBLANES  # first token that is fetched
            count = lax.div(source + end - low + SUBLANES - 1, SUBLANES)
            old = pltpu.make_async_copy(target, held.at[0, :, pl.ds(0, page), :], written)
            old.start()

            def piece(i, new, part):
                near = pl.multiple_of(low + i * SUBLANES, SUBLANES)
                here = pl.multiple_of(i * SUBLANES, SUBLANES)
                return pltpu.make_async_copy(
                    new.at[pl.ds(near, SUBLANES), :], fresh.at[part, pl.ds(here, SUBLANES), :], moved
                )

            def each(act):
                def body(i, _):
                    for part, new in enumerate((k, v)):
                        getattr(piece(i, new, part), act)()
                    return 0

                lax.fori_loop(0, count, body, 0)

            each("start")
            each("wait")
            old.wait()
            shape = (page, page + SUBLANES)
            to, origin = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
            shift = jnp.where(to + (source - low) == origin, 1.0, 0.0).astype(fresh.dtype)
            token = lax.broadcasted_iota(jnp.int32, (page, width), 0)
            inside = (token >= begin) & (token < end)
            for part in (0, 1):
                moved_rows = lax.dot(shift, fresh[part], preferred_element_type=jnp.float32).astype(held.dtype)
                held[0, part, pl.ds(0, page), :] = jnp.where(inside, moved_rows, held[0, part, pl.ds(0, page), :])
            back = pltpu.make_async_copy(held.at[0, :, pl.ds(0, page), :], target, written)
            back.start()
            back.wait()

        return 0

    lax.fori_loop(0, num_writes[0], write, 0)

    def reach(pair):
        """First and last block, exclusive, that a pair attends to; position of the tile's first token in the row."""
        row, begin = pair_rows[pair], pair_tiles[pair] * TILE
        shift = num_computed[row] - query_starts[row]  # from a token's index in the step to its position
        low = jnp.maximum(begin, query_starts[row]) + shift
        high = jnp.minimum(begin + TILE, query_starts[row] + num_new[row]) + shift
        first = 0 if window is None else lax.div(jnp.maximum(low - window + 1, 0), block)
        return first, lax.div(high + block - 1, block), begin + shift

    def fetch(pair, nth, slot):
        base = page_starts[pair_rows[pair]] + nth * BLOCK_PAGES
        return [
            pltpu.make_async_copy(
                cache.at[at, pages[base + i]], held.at[slot, :, pl.ds(i * page, page), :], read.at[slot]
            )
            for i in range(BLOCK_PAGES)
        ]

    def begin_fetch(pair, nth, slot):
        for copy in fetch(pair, nth, slot):
            copy.start()

    def move(hbm, vmem, tile, back):
        away = hbm.at[pl.ds(pl.multiple_of(tile * TILE, TILE), TILE), :]
        copy = pltpu.make_async_copy(vmem, away, moved) if back else pltpu.make_async_copy(away, vmem, moved)
        copy.start()
        copy.wait()

    @pl.when(num_pairs[0] > 0)
    def _():
        begin_fetch(0, reach(0)[0], 0)

    key = lax.broadcasted_iota(jnp.int32, (block, 1), 0)
    query = lax.broadcasted_iota(jnp.int32, (1, TILE), 1)

    def attend(pair, slot):
        tile, row = pair_tiles[pair], pair_rows[pair]
        first, last, base = reach(pair)
        following = jnp.minimum(pair + 1, num_pairs[0] - 1)

        @pl.when((pair == 0) | (pair_tiles[jnp.maximum(pair - 1, 0)] != tile))
        def _():
            total[...] = jnp.zeros(total.shape, jnp.float32)
            top[...] = jnp.full(top.shape, FLOOR, jnp.float32)
            weight[...] = jnp.zeros(weight.shape, jnp.float32)
            move(q, queries, tile, False)

        token = query + tile * TILE - query_starts[row]
        position = jnp.where((token >= 0) & (token < num_new[row]), query + base, -1)  # of queries of other rows: -1

        def attend_block(nth, slot):
            @pl.when(nth + 1 < last)
            def _():
                begin_fetch(pair, nth + 1, 1 - slot)

            @pl.when((nth + 1 == last) & (pair + 1 < num_pairs[0]))
            def _():
                begin_fetch(following, reach(following)[0], 1 - slot)

            for copy in fetch(pair, nth, slot):
                copy.wait()
            seen = key + nth * block <= position
            if window is not None:
                seen = seen & (key + nth * block > position - window)

            def sums(head, keys, values):
                """One query head. keys, values: [block, H]."""
                both_last, both_first = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
                own = queries[:, pl.ds(head * size, size)]
                scores = lax.dot_general(keys, own, both_last, preferred_element_type=jnp.float32)
                if logit_cap is None:
                    scores = scores * (scale * LOG2_E)
                else:
                    scores = jnp.tanh(scores * (scale / logit_cap)) * (logit_cap * LOG2_E)
                scores = jnp.where(seen, scores, MASKED)
                before = top[head]
                higher = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
                share = jnp.exp2(scores - higher)
                kept = jnp.exp2(before - higher)
                top[head] = higher
                weight[head] = weight[head] * kept + jnp.sum(share, axis=0, keepdims=True)
                share = share.astype(held.dtype)
                added = lax.dot_general(values, share, both_first, preferred_element_type=jnp.float32)
                total[head] = total[head] * kept + added

            group = heads // kv_heads
            for kv_head in range(kv_heads):
                own = slice(kv_head * size, (kv_head + 1) * size)
                keys, values = held[slot, 0, :, own], held[slot, 1, :, own]
                for head in range(kv_head * group, (kv_head + 1) * group):
                    sums(head, keys, values)
            return 1 - slot

        slot = lax.fori_loop(first, last, attend_block, slot)

        @pl.when((pair + 1 == num_pairs[0]) | (pair_tiles[following] != tile))
        def _():
            for head in range(heads):
                divisor = weight[head]
                if has_sinks:
                    divisor = divisor + jnp.exp2(sinks[head] - top[head])
                mixed = total[head] / jnp.maximum(divisor, 1e-30)
                results[:, head * size : (head + 1) * size] = mixed.T.astype(results.dtype)
            move(out, results, tile, True)

        return slot

    lax.fori_loop(0, num_pairs[0], attend, 0)
