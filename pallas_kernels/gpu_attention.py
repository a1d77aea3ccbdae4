"""Attention on an NVIDIA GPU in Pallas's Triton lowering: rows of one new token split over keys, others by tiles.

Three or four launches, each in place: keys and values go to their pages, then results to where their queries were. For
one token a program takes one KV head of a row and a part of its pages, all query heads of the group in one tile;
another launch joins the parts where there are several. For several tokens a program takes a tile of a row's tokens and
one query head. No loop is left to XLA, which would ask the host after each turn.
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
PROGRAMS = 512  # wanted at once: about four a processor
TOKENS = 128  # of a tile: dispatch.TILE_TOKENS
FEW_TOKENS = 8  # of a step whose tokens are rows of their own: a launch less where all rows decode
SPARE_TILES = 8  # tiles attended side by side beyond those of whole rows: the others follow them
HEAD_SIZES = (16, 32, 64, 128, 256)  # Triton's tiles are powers of two
WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def available(head_size: int) -> bool:
    return head_size in HEAD_SIZES


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
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Arguments as dispatch.paged_attention and dispatch.Work have them. What padding tokens get is of no meaning."""
    del num_rows, decode_order  # padding rows have num_new == 0
    layer = jnp.full((1,), layer_index, jnp.int32)
    cache = write(k, v, cache, layer, write_page, write_offset, interpret)
    out = attend(
        q.astype(k.dtype),
        cache,
        (layer, page_table, query_starts, num_new, num_computed),
        (tile_rows, tile_starts, num_tiles[None]),
        scale=scale,
        window=window,
        logit_cap=logit_cap,
        interpret=interpret,
    )
    return out, cache


def attend(
    q: Array,
    cache: Array,
    rows: tuple[Array, ...],
    tiles: tuple[Array, ...],
    *,
    scale: float,
    window: int | None,
    logit_cap: float | None,
    interpret: bool,
) -> Array:
    """What queries [T, N, H] see in pages that have their keys already. Arguments as attend_decode and attend_tiles."""
    tokens, heads, _ = q.shape
    limits = {"scale": scale, "window": window, "logit_cap": logit_cap, "interpret": interpret}
    out = q
    if interpret:  # a masked read beyond an array is moved back into it there
        out = jnp.pad(out, ((0, TOKENS), (0, TILE), (0, 0)))
    out = attend_decode(out, cache, heads, rows, **limits)
    if tokens > 1 and tiles[0].shape[0]:
        out = attend_tiles(out, cache, heads, (*rows, *tiles), **limits)
    return out[:tokens, :heads]


def dot(a: Array, b: Array, trans_b: bool = False) -> Array:
    """a @ b, f32; float32 is not rounded to TF32."""
    return plgpu.dot(a, b, trans_b=trans_b, allow_tf32=False if a.dtype == jnp.float32 else None)


def write(k: Array, v: Array, cache: Array, layer: Array, page: Array, offset: Array, interpret: bool) -> Array:
    """The cache with keys and values of T tokens at (page, offset). k, v: [T, K, H]; page, offset: i32 [T]."""
    tokens, kv_heads, size = k.shape
    block = pl.BlockSpec((None, None, size), lambda token, head: (token, head, 0))
    return pl.pallas_call(
        write_kernel,
        grid=(tokens, kv_heads),
        in_specs=[block, block, *[WHOLE] * 4],
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={2: 0},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="write_pages",
    )(k, v, cache, layer, page, offset)


def write_kernel(k, v, _, layer, page, offset, cache):  # type: ignore[no-untyped-def]
    """One head of one token. k, v: [H]; the rest whole."""
    token, head = pl.program_id(0), pl.program_id(1)
    for index, new in enumerate((k[...], v[...])):
        # a masked key has weight 0, and 0 * NaN would reach other rows
        finite = jnp.abs(new.astype(jnp.float32)) < jnp.inf
        kept = jnp.where(finite, new.astype(jnp.float32), 0.0).astype(cache.dtype)
        cache[layer[0], page[token], index, head, offset[token]] = kept


def count_splits(rows: int, kv_heads: int, columns: int) -> int:
    """Parts of a row's pages that are attended side by side: a power of two."""
    wanted = max(1, min(columns, PROGRAMS // (rows * kv_heads), 32))
    return 1 << (wanted.bit_length() - 1)


def attend_decode(
    out: Array,
    cache: Array,
    heads: int,
    rows: tuple[Array, ...],
    *,
    scale: float,
    window: int | None,
    logit_cap: float | None,
    interpret: bool,
) -> Array:
    """`out`, [T, N, H], with the tokens of all rows of one token turned from queries into results.

    cache: [L, P, 2, K, page, H] of out's dtype; heads: N; rows: layer i32 [1], page_table i32 [S, max_pages],
    query_starts, num_new, num_computed i32 [S] each.
    """
    num_rows, columns = rows[1].shape
    kv_heads, page, size = cache.shape[3:]
    splits = count_splits(num_rows, kv_heads, columns)
    group = heads // kv_heads
    tile = -(-group // TILE) * TILE
    body = functools.partial(
        decode_kernel,
        splits=splits, group=group, tile=1 << (tile - 1).bit_length(), page=page,
        scale=scale, window=window, logit_cap=logit_cap,
    )  # fmt: skip
    same = jax.ShapeDtypeStruct(out.shape, out.dtype)
    options = {"compiler_params": plgpu.CompilerParams(num_warps=4, num_stages=2), "interpret": interpret}
    if splits == 1:
        return pl.pallas_call(
            body, grid=(num_rows, kv_heads, 1), in_specs=[WHOLE] * 7, out_specs=WHOLE, out_shape=same,
            input_output_aliases={0: 0}, name="decode_attention", **options,
        )(out, cache, *rows)  # fmt: skip
    parts = [jax.ShapeDtypeStruct((num_rows, heads, splits, *shape), jnp.float32) for shape in ((size,), (), ())]
    found = pl.pallas_call(
        body, grid=(num_rows, kv_heads, splits), in_specs=[WHOLE] * 7, out_specs=[WHOLE] * 3, out_shape=parts,
        name="decode_attention", **options,
    )(out, cache, *rows)  # fmt: skip
    return pl.pallas_call(
        join_kernel, grid=(num_rows, heads), in_specs=[WHOLE] * 6,
        out_specs=WHOLE, out_shape=same, input_output_aliases={0: 0}, name="join_parts",
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1), interpret=interpret,
    )(out, *rows[2:4], *found)  # fmt: skip


def decode_kernel(  # type: ignore[no-untyped-def]
    q, cache, layer, table, query_starts, num_new, num_computed, *outs,  # all whole
    splits, group, tile, page, scale, window, logit_cap,
):  # fmt: skip
    """One part of a row's pages for one KV head. outs: the result, or the parts' sums, tops and weights."""
    row, head, split = (pl.program_id(axis) for axis in range(3))
    at, token = layer[0], query_starts[row]
    one = num_new[row] == 1
    length = jnp.where(one, num_computed[row] + 1, 0)
    first = 0 if window is None else lax.div(jnp.maximum(length - window, 0), page)
    pages = lax.div(length + page - 1, page) - first
    each = lax.div(pages + splits - 1, splits)
    begin = first + split * each
    end = jnp.minimum(begin + each, first + pages)
    size = q.shape[-1]
    every = lax.broadcasted_iota(jnp.int32, (tile, size), 0) < group
    mine = every & one
    queries = plgpu.load(q.at[token, pl.ds(head * group, tile)], mask=mine, other=0.0)

    def attend(column, state):
        top, total, acc = state
        held = table[row, column]
        keys, values = cache[at, held, 0, head], cache[at, held, 1, head]  # [page, H]
        scores = dot(queries, keys, trans_b=True) * scale  # [tile, page]
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
        acc = acc * kept[:, None] + dot(share.astype(values.dtype), values)
        return higher, total, acc

    start = (
        jnp.full((tile,), MASKED, jnp.float32),
        jnp.zeros((tile,), jnp.float32),
        jnp.zeros((tile, size), jnp.float32),
    )
    top, total, acc = lax.fori_loop(begin, end, attend, start)
    heads = pl.ds(head * group, tile)
    if splits == 1:
        (out,) = outs
        mixed = acc / jnp.maximum(total, 1e-30)[:, None]
        plgpu.store(out.at[token, heads], mixed.astype(out.dtype), mask=mine)
        return
    sums, tops, weights = outs
    live = lax.broadcasted_iota(jnp.int32, (tile,), 0) < group
    plgpu.store(sums.at[row, heads, split], acc, mask=every)
    plgpu.store(tops.at[row, heads, split], top, mask=live)
    plgpu.store(weights.at[row, heads, split], total, mask=live)


def join_kernel(_, query_starts, num_new, sums, tops, weights, out):  # type: ignore[no-untyped-def]
    """The parts of one query head of a row. sums: [S, N, splits, H]; tops, weights: [S, N, splits]."""
    row, head = pl.program_id(0), pl.program_id(1)
    highest = tops[row, head]  # [splits]
    share = jnp.exp(highest - jnp.max(highest, axis=0))
    total = jnp.sum(share * weights[row, head], axis=0)
    mixed = jnp.sum(share[:, None] * sums[row, head], axis=0) / jnp.maximum(total, 1e-30)
    one = num_new[row] == 1
    token = jnp.where(one, query_starts[row], 0)
    plgpu.store(out.at[token, head], mixed.astype(out.dtype), mask=jnp.full(mixed.shape, one))


def attend_tiles(
    out: Array,
    cache: Array,
    heads: int,
    work: tuple[Array, ...],
    *,
    scale: float,
    window: int | None,
    logit_cap: float | None,
    interpret: bool,
) -> Array:
    """`out`, [T, N, H], with the tokens of all tiles turned from queries into results.

    work: rows as attend_decode takes them, then row and first token of each tile, i32 [tiles], and their number, [1].
    """
    body = functools.partial(
        tiles_kernel,
        group=heads // cache.shape[3],
        page=cache.shape[4],
        scale=scale,
        window=window,
        logit_cap=logit_cap,
    )
    return pl.pallas_call(
        body,
        grid=(tiles_at_once(out.shape[0], work[5].shape[0]), heads),
        in_specs=[WHOLE] * (2 + len(work)),
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="tiles_attention",
    )(out, cache, *work)


def tiles_at_once(tokens: int, tiles: int) -> int:
    """Programs of a head. One for each tile that there may be: hundreds with nothing to do took 13 us on an H200."""
    return min(tiles, -(-tokens // TOKENS) + SPARE_TILES)


def tiles_kernel(  # type: ignore[no-untyped-def]
    q, cache, layer, table, query_starts, num_new, num_computed, tile_rows, tile_starts, num_tiles, out,
    *, group, page, scale, window, logit_cap,
):  # fmt: skip
    """Each so many-th tile of a row's tokens for one query head."""
    first, head = pl.program_id(0), pl.program_id(1)
    body = functools.partial(
        tile_kernel, q, cache, layer, table, (query_starts, num_new, num_computed), (tile_rows, tile_starts), out,
        head=head, group=group, page=page, scale=scale, window=window, logit_cap=logit_cap,
    )  # fmt: skip
    every = pl.num_programs(0)
    turns = lax.div(num_tiles[0] - first + every - 1, every)
    lax.fori_loop(0, turns, lambda turn, _: body(tile=first + turn * every), None)


def tile_kernel(  # type: ignore[no-untyped-def]
    q, cache, layer, table, rows, tiles, out, *, tile, head, group, page, scale, window, logit_cap
):  # fmt: skip
    """The body of tiles_kernel."""
    query_starts, num_new, num_computed = rows
    at, row, start = layer[0], tiles[0][tile], tiles[1][tile]
    count = jnp.minimum(query_starts[row] + num_new[row] - start, TOKENS)
    base = num_computed[row] + start - query_starts[row]  # position of the tile's first token
    token = lax.broadcasted_iota(jnp.int32, (TOKENS, page), 0)
    mine = lax.broadcasted_iota(jnp.int32, (TOKENS, q.shape[-1]), 0) < count
    queries = plgpu.load(q.at[pl.ds(start, TOKENS), head], mask=mine, other=0.0)
    first = 0 if window is None else lax.div(jnp.maximum(base - window + 1, 0), page)
    last = lax.div(base + count - 1, page) + 1

    def attend(column, state):
        top, total, acc = state
        held = table[row, column]
        keys, values = cache[at, held, 0, head // group], cache[at, held, 1, head // group]  # [page, H]
        scores = dot(queries, keys, trans_b=True) * scale  # [TOKENS, page]
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
        acc = acc * kept[:, None] + dot(share.astype(values.dtype), values)
        return higher, total, acc

    state = (
        jnp.full((TOKENS,), MASKED, jnp.float32),
        jnp.zeros((TOKENS,), jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
    )
    _, total, acc = lax.fori_loop(first, last, attend, state)
    mixed = acc / jnp.maximum(total, 1e-30)[:, None]
    plgpu.store(out.at[pl.ds(start, TOKENS), head], mixed.astype(out.dtype), mask=mine)
