"""Attention of rows with one new token on a TPU: cache write, scores, softmax and sums, one Pallas kernel a layer.

The work is a flat list of blocks, one page of a row each, rows one after another: while a block is attended to, the
next one comes from HBM, whether it is of the same row or not, so that short rows cost what their pages cost. The list
holds for lengths up to a bound that the host knows; the true lengths are read on the device. The new token's key and
value are put into the block that has their place, and the tile of tokens around them goes back to the page. A page has
a token a row, all its heads side by side in the lanes: no head size is padded, a token is a row to write, and with the
queries laid out as a block-diagonal matrix one product gives the scores of all heads. Written without ref.reshape and
ref.bitcast, so that it runs in Pallas's interpreter with its race detector. Source of the softmax over blocks: Dao et
al., FlashAttention (arXiv 2205.14135).
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

LANES = 128  # of a vector register: the tokens of a page
TILE = 16  # tokens that are written together: packed rows of bfloat16
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
    cache: Array,
    layer: Array,
    blocks: Blocks,
    lengths: Array,
    *,
    scale: float,
    window: int | None = None,
    logit_cap: float | None = None,
    sinks: Array | None = None,
    interpret: pltpu.InterpretParams | bool = False,
    name: str = "decode_attention",
) -> tuple[Array, Array]:
    """Write each row's new key and value into its page, then attend -> ([S, N, H] of q's dtype, cache).

    q: [S, N, H]; k, v: [S, W] of the cache's dtype; cache: [L, P, 2, page, W], donated; layer: i32 [1]; lengths: i32
    [S] keys that a row sees, its new one included; 0: the row is padding, its output is left as it is. window: keys
    that are seen, the new one included; sinks: f32 [N]. Raises ValueError for shapes that do not fit.
    """
    rows, heads, size = q.shape
    page, width = cache.shape[3:]
    if page != LANES or width % size or heads % (width // size) or k.shape != (rows, width) or k.dtype != cache.dtype:
        raise ValueError(f"q {q.shape}, k {k.shape} {k.dtype}: pages of {LANES} tokens are wanted, not {cache.shape}")
    here, there = pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pl.ANY)
    sums = [(heads, width), (heads, 1), (heads, 1)]
    body = functools.partial(
        decode_kernel, scale=scale, window=window, logit_cap=logit_cap, has_sinks=sinks is not None
    )
    scalars = (layer, blocks.count, blocks.rows, blocks.pages, blocks.starts, lengths)
    sinks = jnp.zeros((heads, 1), jnp.float32) if sinks is None else sinks.astype(jnp.float32)[:, None]
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[here, here, here, here, there],
            out_specs=[here, there],
            scratch_shapes=[
                pltpu.VMEM((2, 2, page, width), cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
                *(pltpu.VMEM(shape, jnp.float32) for shape in sums),
                pltpu.VMEM((heads, width), q.dtype),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(cache.shape, cache.dtype)],
        input_output_aliases={len(scalars) + 4: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name=name,
    )(*scalars, q, k[:, None], v[:, None], sinks, cache)


def decode_kernel(  # type: ignore[no-untyped-def]
    layer, count, rows, pages, starts, lengths,  # scalars
    q, k, v, sinks, _, out, cache,  # [S, N, H], [S, 1, W] twice, [N, 1], the cache as it comes, [S, N, H], the cache
    held,  # [2, 2, page, W] two blocks: one attended to, one on its way
    read, written,  # semaphores: of each block, of a tile
    total, top, weight,  # [N, W], [N, 1], [N, 1] of the row so far
    queries,  # [N, W] of the row, each in the lanes of its KV head
    *, scale, window, logit_cap, has_sinks,
):  # fmt: skip
    """One program: the loop over the list."""
    (heads, width), size = total.shape, q.shape[2]
    kv_heads = width // size
    lane = lax.broadcasted_iota(jnp.int32, (heads, LANES), 1)
    column, head = (lax.broadcasted_iota(jnp.int32, (heads, width), axis) for axis in (1, 0))
    own = lax.div(column, size) == lax.div(head, heads // kv_heads)  # a query head's lanes
    place = lax.broadcasted_iota(jnp.int32, (TILE, width), 0)

    def fetch(block, slot):
        return pltpu.make_async_copy(cache.at[layer[0], pages[block]], held.at[slot], read.at[slot])

    @pl.when(count[0] > 0)
    def _():
        fetch(0, 0).start()

    def attend(block, _):
        slot, row, first = lax.rem(block, 2), rows[block], starts[block]
        length = lengths[row]
        new = length - 1 - first  # where in the block the new token is
        is_last = (new >= 0) & (new < LANES)
        near = pl.multiple_of(lax.div(lax.rem(jnp.maximum(new, 0), LANES), TILE) * TILE, TILE)

        def write_back():
            tile = (slice(None), pl.ds(near, TILE), slice(None))
            return pltpu.make_async_copy(held.at[(slot, *tile)], cache.at[(layer[0], pages[block], *tile)], written)

        @pl.when(block + 1 < count[0])
        def _():
            fetch(block + 1, 1 - slot).start()

        @pl.when((block == 0) | (rows[jnp.maximum(block - 1, 0)] != row))
        def _():
            total[...] = jnp.zeros(total.shape, jnp.float32)
            top[...] = jnp.full(top.shape, MASKED, jnp.float32)
            weight[...] = jnp.zeros(weight.shape, jnp.float32)
            wide = jnp.concatenate([q[row].astype(jnp.float32)] * kv_heads, axis=1)
            queries[...] = jnp.where(own, wide, 0.0).astype(queries.dtype)

        fetch(block, slot).wait()

        @pl.when(is_last)
        def _():
            for part, fresh in enumerate((k, v)):
                old = held[slot, part, pl.ds(near, TILE), :]
                value = jnp.broadcast_to(fresh[row], old.shape)
                held[slot, part, pl.ds(near, TILE), :] = jnp.where(place == new - near, value, old)
            write_back().start()

        @pl.when(new >= 0)
        def _():
            both_last = (((1,), (1,)), ((), ()))
            scores = lax.dot_general(queries[...], held[slot, 0], both_last, preferred_element_type=jnp.float32) * scale
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
            sums = lax.dot(share.astype(held.dtype), held[slot, 1], preferred_element_type=jnp.float32)
            total[...] = total[...] * kept + sums

        @pl.when(is_last)
        def _():
            divisor = weight[...]
            if has_sinks:
                divisor = divisor + jnp.exp(sinks[...] - top[...])
            wide = jnp.where(own, total[...], 0.0)
            mixed = wide[:, :size]
            for other in range(1, kv_heads):
                mixed = mixed + wide[:, other * size : (other + 1) * size]
            out[row] = (mixed / divisor).astype(out.dtype)
            write_back().wait()

        return 0

    lax.fori_loop(0, count[0], attend, 0)
