"""Attention of rows with several new tokens on a TPU: cache write, scores, softmax and sums, one Pallas kernel a layer.

The step's tokens are cut into tiles at multiples of TILE, whatever rows they belong to, so that every tile lies where
registers do; a list of (tile, row) pairs says what to attend to, and a tile of several rows sums them one after
another, each query masked from rows that are not its own. Scores are held keys by queries: the softmax reduces along
sublanes, which costs vector additions and no lane crossing. First each touched page takes its new tokens: a copy from
HBM to HBM where a whole page lies on a boundary of 16 tokens, otherwise through a product with a matrix of zeros and
ones that shifts rows, exactly. Lengths are read on the device. Written without ref.reshape and ref.bitcast, so that it
runs in Pallas's interpreter with its race detector. Source of the softmax over blocks: Dao et al., FlashAttention
(arXiv 2205.14135).

Pages of 8 bits (tpu_narrow has the forms) are widened once for all query heads of a KV head; their bytes are moved as
int8, which the product with zeros and ones leaves as they are.
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

from pallas_kernels.int8_pages import Cache, joined, parts
from pallas_kernels.tpu_decode import LANES, MASKED
from pallas_kernels.tpu_narrow import check_scales, moved_rows, widened, write_scales

TILE = 128  # queries of a tile
SUBLANES = {2: 16, 1: 32, 4: 8}  # packed rows of so many bytes that are copied together
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
    cache: Cache,
    layer: Array,
    tiles: Tiles,
    *,
    scale: float,
    size: int,
    window: int | None = None,
    logit_cap: float | None = None,
    sinks: Array | None = None,
    new_scales: Array | None = None,
    interpret: pltpu.InterpretParams | bool = False,
    name: str = "prefill_attention",
) -> tuple[Array, Cache]:
    """Write the listed pages' new keys and values, then attend -> ([T, N * H] of q's dtype, cache).

    q: [T, N * H]; k, v: [T, W] of the cache's dtype, finite; T: a multiple of TILE; cache: [L, P, 2, page, W] or
    Int8Pages, donated; layer: i32 [1]; size: H. Tiles of no pair are left as they are, tokens of no listed row are 0.
    window: keys that are seen, a query's own included; sinks: f32 [N]; new_scales: bf16 [T, 2 * K] of k and v, with
    Int8Pages alone. Raises ValueError for shapes that do not fit.
    """
    arrays = parts(cache)
    tokens, lanes = q.shape
    page, width = arrays[0].shape[3:]
    heads, kv_heads = lanes // size, width // size
    if page != LANES or tokens % TILE or lanes % size or width % size or heads % kv_heads:
        raise ValueError(f"q {q.shape} of heads of {size} does not fit a cache {arrays[0].shape}")
    if k.shape != (tokens, width) or v.shape != k.shape or k.dtype != arrays[0].dtype:
        raise ValueError(f"k {k.shape} {k.dtype}, v {v.shape}: ({tokens}, {width}) {arrays[0].dtype} is wanted")
    check_scales(cache, new_scales, (tokens, 2 * kv_heads))
    there, here = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)
    scalars = [getattr(tiles, field) for field in Tiles.__slots__]
    body = functools.partial(
        prefill_kernel,
        size=size,
        scale=scale,
        window=window,
        logit_cap=logit_cap,
        has_sinks=sinks is not None,
        scaled=new_scales is not None,
    )
    block = BLOCK_PAGES * page
    column, of_page = (heads, 1, TILE), (2 * kv_heads, page)
    fresh = (2, page + SUBLANES[k.dtype.itemsize], width)
    given, of_scales = [], []
    if new_scales is not None:  # tokens in the lanes; a page's tokens may lie in two registers, the last one is padding
        given = [jnp.pad(new_scales.astype(jnp.bfloat16).T, ((0, 0), (0, LANES)))]
        of_scales = [pltpu.VMEM((2, BLOCK_PAGES, *of_page), jnp.bfloat16), pltpu.VMEM(of_page, jnp.bfloat16)]
        of_scales.append(pltpu.VMEM((block, 2 * kv_heads), jnp.float32))
    sinks = jnp.zeros((heads,), jnp.float32) if sinks is None else sinks.astype(jnp.float32) * LOG2_E
    first = 1 + len(scalars) + 4 + len(given)
    out, *found = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(scalars),
            grid=(1,),
            in_specs=[here, there, there, there, *[here] * len(given), *[there] * len(arrays)],
            out_specs=[there] * (1 + len(arrays)),
            scratch_shapes=[
                pltpu.VMEM((TILE, lanes), q.dtype),
                pltpu.VMEM((TILE, lanes), q.dtype),
                pltpu.VMEM((2, 2, block, width), k.dtype),
                pltpu.VMEM((heads, size, TILE), jnp.float32),
                pltpu.VMEM(column, jnp.float32),
                pltpu.VMEM(column, jnp.float32),
                pltpu.VMEM(fresh, k.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA,
                *of_scales,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *arrays)],
        input_output_aliases={first + n: 1 + n for n in range(len(arrays))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=48 << 20),
        interpret=interpret,
        name=name,
    )(layer, *scalars, jnp.broadcast_to(sinks[:, None, None], column), q, k, v, *given, *arrays)
    return out, joined(tuple(found))


def prefill_kernel(  # type: ignore[no-untyped-def]
    layer, num_pairs, pair_tiles, pair_rows, num_writes, write_rows, write_columns,
    query_starts, num_new, num_computed, page_starts, pages,  # scalars
    sinks, q, k, v,  # [N, 1, TILE]; the rest in HBM
    *refs, size, scale, window, logit_cap, has_sinks, scaled,
):  # fmt: skip
    """One program: the loop over written pages, then that over pairs and their blocks. scaled: Int8Pages."""
    if scaled:  # [2 * K, T + 128], the pages' scales, [2, BLOCK_PAGES, 2 * K, page], [2 * K, page], [block, 2 * K] f32
        new_scales, _, _, out, cache, scales, *refs, factors, changed, columns = refs
    else:  # the cache as it comes, the result, the cache
        _, out, cache, *refs = refs
    # [TILE, N * H] of the tile, twice; [2, 2, block, W] two blocks: one attended to, one on its way; [N, H, TILE],
    # [N, 1, TILE] twice: of the tile so far; [2, page + sublanes, W] new keys and values of a page; semaphores
    queries, results, held, total, top, weight, fresh, read, moved, written = refs
    block, width = held.shape[2:]
    narrow, sublanes = held.dtype.itemsize == 1, SUBLANES[held.dtype.itemsize]
    page, heads, kv_heads = block // BLOCK_PAGES, queries.shape[1] // size, width // size
    at = layer[0]

    fresh[...] = jnp.zeros(fresh.shape, fresh.dtype)  # what no copy has filled is multiplied by zero: not by NaN

    def write(n, _):
        row = write_rows[n]
        first = write_columns[n] * page  # position of the page's first token
        source = query_starts[row] + first - num_computed[row]  # that token in the step; may be before it
        begin = jnp.maximum(num_computed[row] - first, 0)
        end = jnp.minimum(num_computed[row] + num_new[row] - first, page)
        where = at, pages[page_starts[row] + write_columns[n]]
        target = cache.at[where]
        whole = (begin == 0) & (end == page) & (lax.rem(source, sublanes) == 0)

        @pl.when(whole)
        def _():
            start = pl.multiple_of(jnp.maximum(source, 0), sublanes)
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
            low = lax.div(source + begin, sublanes) * sublanes  # first token that is fetched
            count = lax.div(source + end - low + sublanes - 1, sublanes)
            old = pltpu.make_async_copy(target, held.at[0, :, pl.ds(0, page), :], written)
            old.start()

            def piece(i, new, part):
                near = pl.multiple_of(low + i * sublanes, sublanes)
                here = pl.multiple_of(i * sublanes, sublanes)
                return pltpu.make_async_copy(
                    new.at[pl.ds(near, sublanes), :], fresh.at[part, pl.ds(here, sublanes), :], moved
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
            to, origin = (lax.broadcasted_iota(jnp.int32, (page, page + sublanes), axis) for axis in (0, 1))
            is_origin = to + (source - low) == origin
            token = lax.broadcasted_iota(jnp.int32, (page, width), 0)
            inside = (token >= begin) & (token < end)
            for part in (0, 1):
                old = held[0, part, pl.ds(0, page), :]
                held[0, part, pl.ds(0, page), :] = moved_rows(fresh[part], is_origin, inside, old)
            back = pltpu.make_async_copy(held.at[0, :, pl.ds(0, page), :], target, written)
            back.start()
            back.wait()

        if scaled:
            write_scales(new_scales, scales.at[where], changed, written, source, begin, end)
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
        copies = []
        for i in range(BLOCK_PAGES):
            where, here = (at, pages[base + i]), held.at[slot, :, pl.ds(i * page, page), :]
            copies.append(pltpu.make_async_copy(cache.at[where], here, read.at[slot]))
            if scaled:
                copies.append(pltpu.make_async_copy(scales.at[where], factors.at[slot, i], read.at[slot]))
        return copies

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
            if scaled:
                of_block = jnp.concatenate([factors[slot, i] for i in range(BLOCK_PAGES)], axis=1)
                columns[...] = of_block.astype(jnp.float32).T
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
                share = share.astype(values.dtype)
                added = lax.dot_general(values, share, both_first, preferred_element_type=jnp.float32)
                total[head] = total[head] * kept + added

            group = heads // kv_heads
            for kv_head in range(kv_heads):
                own = slice(kv_head * size, (kv_head + 1) * size)
                keys, values = held[slot, 0, :, own], held[slot, 1, :, own]
                if narrow:
                    lines = columns[:, 2 * kv_head : 2 * kv_head + 2] if scaled else None
                    keys, values = widened(keys, values, lines, queries.dtype)
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
