"""Attention of rows with one new token on a TPU: cache write, scores, softmax and sums, one Pallas kernel a layer.

The work is a flat list of blocks, one page of a row each, rows one after another: while a block is attended to, the
next one comes from HBM, whether it is of the same row or not, so that short rows cost what their pages cost. The list
holds for lengths up to a bound that the host knows; the true lengths are read on the device. The new token's key and
value are put into the block that has their place, and the tile of tokens around them goes back to the page. A page has
a token a row, all its heads side by side in the lanes: no head size is padded, a token is a row to write, and with the
queries laid out as a block-diagonal matrix one product gives the scores of all heads. Written without ref.reshape and
ref.bitcast, so that it runs in Pallas's interpreter with its race detector. Source of the softmax over blocks: Dao et
al., FlashAttention (arXiv 2205.14135).

Pages of 8 bits (tpu_narrow has the forms): the matrix units of every generation take e4m3 beside bfloat16 as it comes,
int8 is widened on the way to them, its scales meet scores and shares. Such a token is written by masks into words of
four tokens.
Letters: S rows · N query heads · K KV heads · H head size · W = K * H · L layers · P pages · B blocks of the list.
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
from pallas_kernels.tpu_narrow import check_scales, repeated_bytes

LANES = 128  # of a vector register: the tokens of a page
TILE = 16  # tokens that are written together: packed rows of bfloat16
NARROW_TILE = 32  # the same of pages of 8 bits
SUBLANES = 8  # rows of a register of float32
MASKED = -1e30  # finite, so that a block of masked keys alone gives no NaN


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The list, rows in order. Entries from `count` on are not looked at."""

    count: Array  # i32 [1]
    rows: Array  # i32 [B]
    pages: Array  # i32 [B]
    starts: Array  # i32 [B] index in its sequence of a block's first token


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: Cache,
    layer: Array,
    blocks: Blocks,
    lengths: Array,
    *,
    scale: float,
    window: int | None = None,
    logit_cap: float | None = None,
    sinks: Array | None = None,
    new_scales: Array | None = None,
    interpret: pltpu.InterpretParams | bool = False,
    name: str = "decode_attention",
) -> tuple[Array, Cache]:
    """Write each row's new key and value into its page, then attend -> ([S, N, H] of q's dtype, cache).

    q: [S, N, H]; k, v: [S, W] of the cache's dtype; cache: [L, P, 2, page, W] or Int8Pages, donated; layer: i32 [1];
    lengths: i32 [S] keys that a row sees, its new one included; 0: the row is padding, its output is left as it is.
    window: keys that are seen, the new one included; sinks: f32 [N]; new_scales: bf16 [S, 2 * K] of k and v, with
    Int8Pages alone. Raises ValueError for shapes that do not fit.
    """
    held = parts(cache)
    rows, heads, size = q.shape
    page, width = held[0].shape[3:]
    if page != LANES or width % size or heads % (width // size) or k.shape != (rows, width) or k.dtype != held[0].dtype:
        raise ValueError(f"q {q.shape}, k {k.shape} {k.dtype}: pages of {LANES} tokens are wanted, not {held[0].shape}")
    both = 2 * width // size
    check_scales(cache, new_scales, (rows, both))
    here, there = pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pl.ANY)
    narrow = held[0].dtype.itemsize == 1
    scalars = (layer, blocks.count, blocks.rows, blocks.pages, blocks.starts, lengths)
    sinks_column = jnp.zeros((heads, 1), jnp.float32) if sinks is None else sinks.astype(jnp.float32)[:, None]
    k, v = (repeated_bytes(x)[:, None] if narrow else x[:, None] for x in (k, v))
    given = [q, k, v, sinks_column, *([] if new_scales is None else [new_scales.astype(jnp.float32)[:, None]])]
    of_scales = [pltpu.VMEM((2, both, page), jnp.bfloat16), pltpu.VMEM((2 * heads, both), jnp.bfloat16)]
    out, *found = pl.pallas_call(
        functools.partial(
            decode_kernel, scale=scale, window=window, logit_cap=logit_cap, has_sinks=sinks is not None,
            narrow=narrow, scaled=new_scales is not None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[here] * len(given) + [there] * len(held),
            out_specs=[here] + [there] * len(held),
            scratch_shapes=[
                pltpu.VMEM((2, 2, page, width), held[0].dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
                *(pltpu.VMEM(shape, jnp.float32) for shape in [(heads, width), (heads, 1), (heads, 1)]),
                pltpu.VMEM((heads, width), q.dtype),
                *(of_scales if new_scales is not None else []),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *held)],
        input_output_aliases={len(scalars) + len(given) + n: 1 + n for n in range(len(held))},
        # a check of each copy's place takes 26 bundles: a page of 16 bits takes longer to come, one of 8 bits does not
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=narrow),
        interpret=interpret,
        name=name,
    )(*scalars, *given, *held)  # fmt: skip
    return out, joined(tuple(found))


def decode_kernel(  # type: ignore[no-untyped-def]
    layer, count, rows, pages, starts, lengths,  # scalars
    q, k, v, sinks,  # [S, N, H], [S, 1, W] twice, words of four times a byte where narrow, [N, 1]
    *refs, scale, window, logit_cap, has_sinks, narrow, scaled,
):  # fmt: skip
    """One program: the loop over the list. narrow: pages of 8 bits; scaled: Int8Pages."""
    if scaled:  # [S, 1, 2 * K], the pages' scales, [2, 2 * K, page] of two blocks, [2 * N, 2 * K]
        fresh, _, _, out, cache, scales, *refs, factors, spread = refs
    else:  # the cache as it comes, [S, N, H], the cache
        _, out, cache, *refs = refs
    # [2, 2, page, W] two blocks: one attended to, one on its way; semaphores of each block and of a tile; [N, W],
    # [N, 1], [N, 1] of the row so far; [N, W] its queries, each in the lanes of its KV head
    held, read, written, total, top, weight, queries = refs
    (heads, width), size = total.shape, q.shape[2]
    kv_heads = width // size
    tile_tokens = NARROW_TILE if narrow else TILE
    lane = lax.broadcasted_iota(jnp.int32, (heads, LANES), 1)
    column, head = (lax.broadcasted_iota(jnp.int32, (heads, width), axis) for axis in (1, 0))
    own = lax.div(column, size) == lax.div(head, heads // kv_heads)  # a query head's lanes
    place = lax.broadcasted_iota(jnp.int32, (8 if narrow else TILE, width), 0)

    def fetch(block, slot):
        """The copies of a block's page."""
        copies = [pltpu.make_async_copy(cache.at[layer[0], pages[block]], held.at[slot], read.at[slot])]
        if scaled:
            copies.append(pltpu.make_async_copy(scales.at[layer[0], pages[block]], factors.at[slot], read.at[slot]))
        return copies

    def start(copies):
        for copy in copies:
            copy.start()

    def wait(copies):
        for copy in copies:
            copy.wait()

    if scaled:  # spread @ a page's scales: those of each query head's keys, then of its values
        to, origin = (lax.broadcasted_iota(jnp.int32, spread.shape, axis) for axis in (0, 1))
        source = 2 * lax.div(lax.rem(to, heads), heads // kv_heads) + jnp.where(to < heads, 0, 1)
        spread[...] = jnp.where(origin == source, 1.0, 0.0).astype(spread.dtype)

    @pl.when(count[0] > 0)
    def _():
        start(fetch(0, 0))

    def attend(block, _):
        slot, row, first = lax.rem(block, 2), rows[block], starts[block]
        length = lengths[row]
        new = length - 1 - first  # where in the block the new token is
        is_last = (new >= 0) & (new < LANES)
        near = pl.multiple_of(lax.div(lax.rem(jnp.maximum(new, 0), LANES), tile_tokens) * tile_tokens, tile_tokens)

        def write_back():
            tile = (slice(None), pl.ds(near, tile_tokens), slice(None))
            where = layer[0], pages[block]
            copies = [pltpu.make_async_copy(held.at[(slot, *tile)], cache.at[(*where, *tile)], written)]
            if scaled:
                copies.append(pltpu.make_async_copy(factors.at[slot], scales.at[where], written))
            return copies

        def put(part, fresh):
            """The new token into its tile."""
            old = held[slot, part, pl.ds(near, tile_tokens), :]
            if narrow:  # a word has a byte of each of four tokens
                old, byte = pltpu.bitcast(old, jnp.int32), lax.shift_left(jnp.int32(0xFF), 8 * lax.rem(new, 4))
                mask = jnp.where(place == lax.div(new - near, 4), byte, 0)
                value = pltpu.bitcast(old & ~mask | fresh & mask, held.dtype)
            else:
                value = jnp.where(place == new - near, jnp.broadcast_to(fresh, old.shape), old)
            held[slot, part, pl.ds(near, tile_tokens), :] = value

        @pl.when(block + 1 < count[0])
        def _():
            start(fetch(block + 1, 1 - slot))

        @pl.when((block == 0) | (rows[jnp.maximum(block - 1, 0)] != row))
        def _():
            total[...] = jnp.zeros(total.shape, jnp.float32)
            top[...] = jnp.full(top.shape, MASKED, jnp.float32)
            weight[...] = jnp.zeros(weight.shape, jnp.float32)
            wide = jnp.concatenate([q[row].astype(jnp.float32)] * kv_heads, axis=1)
            queries[...] = jnp.where(own, wide, 0.0).astype(queries.dtype)

        wait(fetch(block, slot))

        @pl.when(is_last)
        def _():
            put(0, k[row])
            put(1, v[row])
            if scaled:
                token = lax.broadcasted_iota(jnp.int32, factors.shape[1:], 1)
                to, origin = (lax.broadcasted_iota(jnp.int32, (2 * kv_heads, 2 * kv_heads), axis) for axis in (0, 1))
                column = jnp.sum(jnp.where(to == origin, fresh[row], 0.0), axis=1, keepdims=True)
                changed = jnp.where(token == new, column, factors[slot].astype(jnp.float32))
                factors[slot] = changed.astype(factors.dtype)
            start(write_back())

        @pl.when(new >= 0)
        def _():
            both_last = (((1,), (1,)), ((), ()))
            keys, values = (held[slot, part].astype(queries.dtype) if scaled else held[slot, part] for part in (0, 1))
            if scaled:  # two products: of one, the values' half would be held in registers until shares are there
                of_keys = lax.dot(spread[:heads], factors[slot], preferred_element_type=jnp.float32)
            scores = lax.dot_general(queries[...], keys, both_last, preferred_element_type=jnp.float32) * scale
            if scaled:
                scores = scores * of_keys
            if logit_cap is not None:
                scores = logit_cap * jnp.tanh(scores / logit_cap)
            seen = lane <= new
            if window is not None:
                seen = seen & (lane > new - window)
            scores = jnp.where(seen, scores, MASKED)
            before = top[...]
            higher = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            share = jnp.exp(scores - higher)
            if window is not None:  # a block may have no key that is seen
                share = jnp.where(seen, share, 0.0)
            kept = jnp.exp(before - higher)
            top[...] = higher
            weight[...] = weight[...] * kept + jnp.sum(share, axis=1, keepdims=True)
            if scaled:
                share = share * lax.dot(spread[heads:], factors[slot], preferred_element_type=jnp.float32)
            share = share.astype(queries.dtype if narrow else held.dtype)
            total[...] = total[...] * kept + lax.dot(share, values, preferred_element_type=jnp.float32)

        @pl.when(is_last)
        def _():
            divisor = weight[...]
            if has_sinks:
                divisor = divisor + jnp.exp(sinks[...] - top[...])
            group, mixed = heads // kv_heads, []
            for begin in range(0, heads, SUBLANES):  # a register's rows: their masks are few, and alike in all of them
                rows_of = slice(begin, min(begin + SUBLANES, heads))
                first, last = begin // group, (rows_of.stop - 1) // group  # KV heads
                line = lax.broadcasted_iota(jnp.int32, (rows_of.stop - begin, size), 0)
                of_head = lax.div(line + begin % group, group)  # counted from `first`
                block = total[rows_of, first * size : (first + 1) * size]
                for other in range(first + 1, last + 1):
                    own_part = total[rows_of, other * size : (other + 1) * size]
                    block = jnp.where(of_head == other - first, own_part, block)
                mixed.append(block)
            out[row] = (jnp.concatenate(mixed, axis=0) / divisor).astype(out.dtype)
            wait(write_back())

        return 0

    lax.fori_loop(0, count[0], attend, 0)
