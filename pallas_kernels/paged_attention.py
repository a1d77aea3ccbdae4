"""Ragged paged attention in plain XLA: runs anywhere, the reference of every other kernel.

Rows with one new token (decode) are attended in groups of rows of like length, page by page, with a dynamic number of
pages; rows with more (prefill) by tiles of queries, blocks of pages, dynamic numbers of both. Work is proportional to
the tokens attended, and nothing larger than a block is ever gathered: the cache is indexed in place.
Letters: T tokens · S rows · N query heads · K KV heads · G = N / K · H head size · B pages of a block.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.int8_pages import Cache, Int8Pages, rounded

DECODE_GROUP = 8  # rows attended together: they cost as much as the longest of them
BLOCK_TOKENS = 256  # keys of a prefill block
TILE_TOKENS = 128
E4M3_MAX = 448.0
MASKED = -1e30  # finite, so that a tile of masked keys alone gives no NaN


def paged_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: Cache,
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
) -> tuple[Array, Cache]:
    """Arguments as dispatch.paged_attention and dispatch.Work have them."""
    del num_rows  # padding rows have num_new == 0
    cache = write(k, v, cache, layer_index, write_page, write_offset)
    tokens, heads, size = q.shape
    q = q.astype(jnp.float32).reshape(tokens, k.shape[1], -1, size) * scale  # [T, K, G, H]
    rows = Rows(page_table, query_starts, num_new, num_computed)
    limits = Limits(window, logit_cap)
    out = jnp.zeros(q.shape, jnp.float32)
    out = attend_decode(q, out, cache, layer_index, rows, limits, decode_order)
    if tokens > 1:
        tile = min(tokens, TILE_TOKENS)
        out = attend_tiles(q, out, cache, layer_index, rows, limits, (tile_rows, tile_starts, num_tiles, tile))
    return out.reshape(tokens, heads, size).astype(k.dtype), cache


class Rows:
    """The rows of a step, each array i32 [S] but page_table [S, max_pages]."""

    def __init__(self, page_table: Array, query_starts: Array, num_new: Array, num_computed: Array) -> None:
        self.page_table = page_table
        self.query_starts = query_starts
        self.num_new = num_new
        self.num_computed = num_computed


class Limits:
    """What a query may see, and the cap on its logits."""

    def __init__(self, window: int | None, logit_cap: float | None) -> None:
        self.window = window
        self.logit_cap = logit_cap

    def first_key(self, position: Array) -> Array:
        """The first position that a query at `position` sees."""
        if self.window is None:
            return jnp.zeros_like(position)
        return jnp.maximum(position - self.window + 1, 0)  # the window holds the query itself

    def apply(self, scores: Array, query: Array, key: Array) -> Array:
        """Cap and mask scores. query, key: positions, of shapes that broadcast with scores."""
        if self.logit_cap is not None:
            scores = self.logit_cap * jnp.tanh(scores / self.logit_cap)
        seen = key <= query
        if self.window is not None:
            seen &= key > query - self.window
        return jnp.where(seen, scores, MASKED)


def page_tokens(cache: Cache) -> int:
    codes = cache.codes if isinstance(cache, Int8Pages) else cache
    return codes.shape[4]


def write(k: Array, v: Array, cache: Cache, layer_index: int | Array, page: Array, offset: Array) -> Cache:
    """Put keys and values of T tokens at (page, offset). k, v: [T, K, H]; page, offset: i32 [T]."""
    both = jnp.stack((k, v), axis=1)  # [T, 2, K, H]
    both = jnp.where(jnp.isfinite(both), both, 0)  # a masked key has weight 0, and 0 * NaN would reach other rows
    if isinstance(cache, Int8Pages):
        codes, scales = rounded(both)
        return Int8Pages(
            codes=put(codes, cache.codes, layer_index, page, offset),
            scales=put(as_bits(scales, cache.scales), cache.scales, layer_index, page, offset),
        )
    if cache.dtype == jnp.uint16:
        both = as_bits(both.astype(jnp.bfloat16), cache)
    elif cache.dtype in (jnp.uint8, jnp.float8_e4m3fn):
        both = jnp.clip(both, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)  # beyond is NaN
        both = as_bits(both, cache)
    return put(both.astype(cache.dtype), cache, layer_index, page, offset)


def as_bits(x: Array, cache: Array) -> Array:
    """x as the cache stores it, where that is the same bits by another name."""
    return lax.bitcast_convert_type(x, cache.dtype)


def put(both: Array, cache: Array, layer_index: int | Array, page: Array, offset: Array) -> Array:
    """Into cache [L, P, 2, K, page, ...], in place. both: [T, 2, K, ...], as stored."""
    return lax.platform_dependent(cache, both, layer_index, page, offset, cpu=put_each, default=put_all)


def put_all(cache: Array, both: Array, layer_index: Array, page: Array, offset: Array) -> Array:
    """As put."""
    # advanced indexes apart from each other move to the front: the value is [T, 2, K, ...]
    return cache.at[layer_index, page, :, :, offset].set(both, mode="promise_in_bounds")


def put_each(cache: Array, both: Array, layer_index: Array, page: Array, offset: Array) -> Array:
    """The same, a token a turn: XLA:CPU copies the whole pool twice around that scatter (8 layers of 4 MB: 50 ms)."""

    rest = (0,) * (cache.ndim - 5)

    def put_one(token: Array, cache: Array) -> Array:
        return lax.dynamic_update_slice(
            cache, both[token][None, None, :, :, None], (layer_index, page[token], 0, 0, offset[token], *rest)
        )

    return lax.fori_loop(0, len(both), put_one, cache)


def read(cache: Cache, layer_index: int, pages: Array) -> tuple[Array, Array]:
    """Keys and values of whole pages. pages: i32 [B] -> two f32 [B, K, page, H]."""
    if isinstance(cache, Int8Pages):
        keys, values = read(cache.codes, layer_index, pages)
        of_keys, of_values = read(cache.scales, layer_index, pages)  # [B, K, page]
        return keys * of_keys[..., None], values * of_values[..., None]
    block = cache.at[layer_index, pages].get(mode="promise_in_bounds")
    if block.dtype == jnp.uint16:
        block = lax.bitcast_convert_type(block, jnp.bfloat16)
    if block.dtype == jnp.uint8:
        block = lax.bitcast_convert_type(block, jnp.float8_e4m3fn)
    block = block.astype(jnp.float32)
    return block[:, 0], block[:, 1]


def merge(state: tuple[Array, Array, Array], scores: Array, values: Array, spec: str) -> tuple[Array, Array, Array]:
    """One step of the online softmax. state: running maximum and sum [..., 1], weighted values; scores: [..., keys]."""
    top, total, acc = state
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
    shrink, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top)
    total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
    return new_top, total, acc * shrink + jnp.einsum(spec, weights, values, preferred_element_type=jnp.float32)


def attend_decode(
    q: Array, out: Array, cache: Cache, layer_index: int, rows: Rows, limits: Limits, order: Array
) -> Array:
    """Rows with one new token. q, out: f32 [T, K, G, H]; order: i32 [S]."""
    num_rows, page = order.shape[0], page_tokens(cache)
    group = min(num_rows, DECODE_GROUP)
    padded = jnp.pad(order, (0, -num_rows % group))  # repeats row 0, which is then computed twice and alike
    tokens, max_pages = q.shape[0], rows.page_table.shape[1]

    def attend_group(index: Array, out: Array) -> Array:
        members = lax.dynamic_slice(padded, (index * group,), (group,))
        decodes = rows.num_new[members] == 1
        token = jnp.clip(rows.query_starts[members], 0, tokens - 1)
        query, position = q[token], rows.num_computed[members]  # [R, K, G, H], [R]
        first = limits.first_key(position) // page
        num_pages = jnp.where(decodes, position // page + 1 - first, 0)
        table = rows.page_table[members]

        def attend_page(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            column = first + step
            pages = jnp.take_along_axis(table, jnp.clip(column, 0, max_pages - 1)[:, None], axis=1)[:, 0]
            keys, values = read(cache, layer_index, pages)
            scores = jnp.einsum("rkgh,rkph->rkgp", query, keys, preferred_element_type=jnp.float32)
            key = column[:, None] * page + jnp.arange(page)  # [R, page]
            scores = limits.apply(scores, position[:, None, None, None], key[:, None, None, :])
            return merge(state, scores, values, "rkgp,rkph->rkgh")

        empty = start(query)
        _, total, acc = lax.fori_loop(0, jnp.max(num_pages), attend_page, empty)
        target = jnp.where(decodes, token, tokens)  # out of bounds: dropped
        return out.at[target].set(acc / jnp.maximum(total, 1e-30), mode="drop")

    groups = (jnp.sum(rows.num_new > 0) + group - 1) // group  # `order` puts padding last
    return lax.fori_loop(0, groups, attend_group, out)


def start(query: Array) -> tuple[Array, Array, Array]:
    """The empty state of `merge` for queries [..., H]."""
    column = query[..., :1]
    return jnp.full_like(column, MASKED), jnp.zeros_like(column), jnp.zeros_like(query)


def attend_tiles(
    q: Array,
    out: Array,
    cache: Cache,
    layer_index: int,
    rows: Rows,
    limits: Limits,
    tiles: tuple[Array, Array, Array, int],
) -> Array:
    """Rows with several new tokens. q, out: f32 [T, K, G, H]; tiles: rows, first tokens, their number, tile size."""
    tile_rows, tile_starts, num_tiles, tile = tiles
    tokens, kv_heads, groups, size = q.shape
    page, max_pages = page_tokens(cache), rows.page_table.shape[1]
    block = max(1, BLOCK_TOKENS // page)
    q_padded = jnp.pad(q, ((0, tile), (0, 0), (0, 0), (0, 0)))  # a tile may reach behind the last token

    def attend_tile(index: Array, out: Array) -> Array:
        row, token = tile_rows[index], tile_starts[index]
        inside = token - rows.query_starts[row]
        count = jnp.minimum(rows.num_new[row] - inside, tile)
        position = rows.num_computed[row] + inside + jnp.arange(tile)  # [tile]
        query = lax.dynamic_slice(q_padded, (token, 0, 0, 0), (tile, kv_heads, groups, size))
        query = query.transpose(1, 2, 0, 3)  # [K, G, tile, H]
        table = rows.page_table[row]
        first = limits.first_key(position[0]) // page
        num_pages = (position[0] + count - 1) // page + 1 - first

        def attend_block(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            columns = first + step * block + jnp.arange(block)
            keys, values = read(cache, layer_index, table[jnp.clip(columns, 0, max_pages - 1)])
            keys = keys.transpose(1, 0, 2, 3).reshape(kv_heads, block * page, size)
            values = values.transpose(1, 0, 2, 3).reshape(kv_heads, block * page, size)
            scores = jnp.einsum("kgth,kph->kgtp", query, keys, preferred_element_type=jnp.float32)
            key = (first + step * block) * page + jnp.arange(block * page)
            scores = limits.apply(scores, position[:, None], key)
            return merge(state, scores, values, "kgtp,kph->kgth")

        empty = start(query)
        _, total, acc = lax.fori_loop(0, (num_pages + block - 1) // block, attend_block, empty)
        result = (acc / jnp.maximum(total, 1e-30)).transpose(2, 0, 1, 3)  # [tile, K, G, H]
        target = jnp.where(jnp.arange(tile) < count, token + jnp.arange(tile), tokens)  # out of bounds: dropped
        return out.at[target].set(result, mode="drop")

    return lax.fori_loop(0, num_tiles, attend_tile, out)
