"""Attention on an NVIDIA GPU in Pallas's Triton lowering: rows of one new token split over keys, others by tiles.

For one token a program takes one KV head of a row and a part of its pages, all query heads of the group in one tile;
plain operations join the parts. For several a program takes a tile of a row's tokens and one query head. No loop is
left to XLA, which would ask the host after each turn. Keys and values are in the pages already.
Source of splitting: Dao, Haziza, Massa, Sizov, Flash-Decoding (2023).
Letters: T tokens · S rows · N query heads · K KV heads · G = N / K · H head size · L layers · P pages of the pool.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention import MASKED

TILE = 16  # rows of the smallest product
PROGRAMS = 528  # wanted at once: four a processor
TOKENS = 128  # of a tile: dispatch.TILE_TOKENS
HEAD_SIZES = (64, 128, 256)  # Triton's tiles are powers of two


def available(head_size: int) -> bool:
    return head_size in HEAD_SIZES


def attend_decode(
    q: Array,
    cache: Array,
    layer_index: Array,
    lengths: Array,
    page_table: Array,
    *,
    scale: float,
    window: int | None,
    logit_cap: float | None,
    interpret: bool = False,
) -> Array:
    """-> f32 [S, N, H]. q: [S, N, H] of the cache's dtype; cache: [L, P, 2, K, page, H]; lengths: i32 [S] keys that a
    row sees, its new one included, 0 for rows that are not looked at; page_table: i32 [S, max_pages]."""
    rows, heads, size = q.shape
    kv_heads, page, columns = cache.shape[3], cache.shape[4], page_table.shape[1]
    group = heads // kv_heads
    splits = max(1, min(columns, -(-PROGRAMS // (rows * kv_heads)), 32))
    grouped = q.reshape(rows, kv_heads, group, size)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, -group % TILE), (0, 0)))
    tile = grouped.shape[2]
    body = functools.partial(decode_kernel, splits=splits, page=page, scale=scale, window=window, logit_cap=logit_cap)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    shapes = [(rows, kv_heads, splits, tile, size), *[(rows, kv_heads, splits, tile)] * 2]
    sums, tops, weights = pl.pallas_call(
        body,
        grid=(rows, kv_heads, splits),
        in_specs=[
            pl.BlockSpec((None, None, tile, size), lambda row, head, split: (row, head, 0, 0)),
            whole,
            whole,
            whole,
            whole,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, tile, size), lambda row, head, split: (row, head, split, 0, 0)),
            *[pl.BlockSpec((None, None, None, tile), lambda row, head, split: (row, head, split, 0))] * 2,
        ],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(grouped, cache, jnp.reshape(layer_index, (1,)).astype(jnp.int32), lengths, page_table)
    top = jnp.max(tops, axis=2, keepdims=True)
    share = jnp.exp(tops - top)  # [S, K, splits, tile]
    total = jnp.maximum(jnp.sum(weights * share, axis=2), 1e-30)
    mixed = jnp.sum(sums * share[..., None], axis=2) / total[..., None]
    return mixed[:, :, :group].reshape(rows, heads, size)


def decode_kernel(  # type: ignore[no-untyped-def]
    q, cache, layer, lengths, table,  # [tile, H]; the rest whole
    sums, tops, weights,  # [tile, H], [tile], [tile]
    *, splits, page, scale, window, logit_cap,
):  # fmt: skip
    """One part of a row's pages for one KV head."""
    row, head, split = (pl.program_id(axis) for axis in range(3))
    at, length = layer[0], lengths[row]
    first = 0 if window is None else lax.div(jnp.maximum(length - window, 0), page)
    pages = lax.div(length + page - 1, page) - first
    each = lax.div(pages + splits - 1, splits)
    begin = first + split * each
    end = jnp.minimum(begin + each, first + pages)
    queries = q[...]
    tile = queries.shape[0]

    def attend(column, state):
        top, total, acc = state
        held = table[row, column]
        keys, values = cache[at, held, 0, head], cache[at, held, 1, head]  # [page, H]
        scores = plgpu.dot(queries, keys, trans_b=True) * scale  # [tile, page]
        if logit_cap is not None:
            scores = logit_cap * jnp.tanh(scores / logit_cap)
        key = column * page + lax.broadcasted_iota(jnp.int32, (tile, page), 1)
        seen = key < length
        if window is not None:
            seen = seen & (key >= length - window)
        scores = jnp.where(seen, scores, MASKED)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        share = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0.0)
        kept = jnp.exp(top - higher)
        total = total * kept + jnp.sum(share, axis=1)
        acc = acc * kept[:, None] + plgpu.dot(share.astype(values.dtype), values)
        return higher, total, acc

    start = (
        jnp.full((tile,), MASKED, jnp.float32),
        jnp.zeros((tile,), jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
    )
    top, total, acc = lax.fori_loop(begin, end, attend, start)
    sums[...], tops[...], weights[...] = acc, top, total


def attend_tiles(
    q: Array,
    out: Array,
    cache: Array,
    layer_index: Array,
    page_table: Array,
    rows: tuple[Array, Array, Array],
    tiles: tuple[Array, Array, Array],
    *,
    scale: float,
    window: int | None,
    logit_cap: float | None,
    interpret: bool = False,
) -> Array:
    """`out` with the tokens of all tiles, f32 [T, N, H]. q: [T, N, H] of the cache's dtype; rows: query_starts, new and
    computed tokens, i32 [S] each; tiles: row and first token of each, i32 [tiles], and their number, i32 []."""
    tokens, heads, _ = q.shape
    padded = jnp.pad(q, ((0, TOKENS), (0, 0), (0, 0)))
    held = jnp.pad(out, ((0, TOKENS), (0, 0), (0, 0)))
    body = functools.partial(
        tiles_kernel,
        group=heads // cache.shape[3],
        page=cache.shape[4],
        scale=scale,
        window=window,
        logit_cap=logit_cap,
    )
    whole = pl.BlockSpec(memory_space=pl.ANY)
    scalars = (jnp.reshape(layer_index, (1,)).astype(jnp.int32), page_table, *rows, *tiles[:2], tiles[2][None])
    found = pl.pallas_call(
        body,
        grid=(tiles[0].shape[0], heads),
        in_specs=[whole] * (3 + len(scalars)),
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(held.shape, jnp.float32),
        input_output_aliases={2: 0},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="tiles_attention",
    )(padded, cache, held, *scalars)
    return found[:tokens]


def tiles_kernel(  # type: ignore[no-untyped-def]
    q, cache, _, layer, table, query_starts, num_new, num_computed, tile_rows, tile_starts, num_tiles, out,
    *, group, page, scale, window, logit_cap,
):  # fmt: skip
    """One tile of a row's tokens for one query head."""
    tile, head = pl.program_id(0), pl.program_id(1)
    at, row, start = layer[0], tile_rows[tile], tile_starts[tile]
    live = tile < num_tiles[0]
    count = jnp.where(live, jnp.minimum(query_starts[row] + num_new[row] - start, TOKENS), 0)
    base = num_computed[row] + start - query_starts[row]  # position of the tile's first token
    token = lax.broadcasted_iota(jnp.int32, (TOKENS, page), 0)
    queries = q[pl.ds(start, TOKENS), head]
    first = 0 if window is None else lax.div(jnp.maximum(base - window + 1, 0), page)
    last = jnp.where(count > 0, lax.div(base + count - 1, page) + 1, 0)

    def attend(column, state):
        top, total, acc = state
        held = table[row, column]
        keys, values = cache[at, held, 0, head // group], cache[at, held, 1, head // group]  # [page, H]
        scores = plgpu.dot(queries, keys, trans_b=True) * scale  # [TOKENS, page]
        if logit_cap is not None:
            scores = logit_cap * jnp.tanh(scores / logit_cap)
        key = column * page + lax.broadcasted_iota(jnp.int32, (TOKENS, page), 1)
        seen = key <= base + token
        if window is not None:
            seen = seen & (key > base + token - window)
        scores = jnp.where(seen, scores, MASKED)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        share = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0.0)
        kept = jnp.exp(top - higher)
        total = total * kept + jnp.sum(share, axis=1)
        acc = acc * kept[:, None] + plgpu.dot(share.astype(values.dtype), values)
        return higher, total, acc

    state = (
        jnp.full((TOKENS,), MASKED, jnp.float32),
        jnp.zeros((TOKENS,), jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
    )
    _, total, acc = lax.fori_loop(first, last, attend, state)
    mine = lax.broadcasted_iota(jnp.int32, queries.shape, 0) < count
    plgpu.store(out.at[pl.ds(start, TOKENS), head], acc / jnp.maximum(total, 1e-30)[:, None], mask=mine)
