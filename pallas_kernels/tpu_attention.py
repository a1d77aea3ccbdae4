"""Paged attention of a whole step on a TPU: rows of one new token by tpu_decode, rows of several by tpu_prefill.

The cache's type says what its pages hold: bfloat16 (or float32), float8_e4m3fn without scales, or Int8Pages; keys and
values are rounded to that here, once a layer.
Letters: T tokens · S rows · N query heads · K KV heads · H head size · W = K * H · L layers · P pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.int8_pages import Cache, Int8Pages
from pallas_kernels.tpu_decode import LANES, Blocks, decode_attention
from pallas_kernels.tpu_lists import decode_blocks, prefill_tiles
from pallas_kernels.tpu_narrow import round_tokens
from pallas_kernels.tpu_prefill import BLOCK_PAGES, TILE, Tiles, prefill_attention

MAX_LISTED = 1 << 15
"""Most pages of a list: three numbers each must fit in scalar memory (1 MiB)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """The work of one group in one step, for rows whose pages fit a list together."""

    blocks: Blocks
    lengths: Array  # i32 [S] keys seen by rows of one new token, 0 for other rows
    decode_tokens: Array  # i32 [S] their tokens in the step, T for other rows
    tiles: Tiles
    several: Array  # bool [T] tokens of rows with several


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """The work of one group in one step: one round, but where rows may hold more than MAX_LISTED pages together."""

    count: Array  # i32 [] rounds that have rows
    lists: Lists  # all arrays [rounds, ...]


def make_lists(
    table: Array, query_starts: Array, num_new: Array, num_computed: Array, tokens: int, window: int | None
) -> Rounds:
    """table: i32 [S, max_pages]; query_starts, num_new, num_computed: i32 [S], num_new 0 in padding; tokens: T."""
    rows, columns = table.shape
    most = columns + BLOCK_PAGES  # entries of one row
    capacity = min(rows * most, max(MAX_LISTED, 2 * most))
    room = capacity if capacity == rows * most else capacity - most
    entries = jnp.where(num_new > 0, -(-(num_computed + num_new) // LANES) + BLOCK_PAGES, 0)
    rounds = (jnp.cumsum(entries) - entries) // room
    index = jnp.arange(tokens)
    padded = -(-tokens // TILE) * TILE

    def of_round(number: Array) -> Lists:
        new = jnp.where(rounds == number, num_new, 0)
        lengths = jnp.where(new == 1, num_computed + 1, 0)
        several = jnp.where(new == 1, 0, new)
        inside = (index[:, None] >= query_starts) & (index[:, None] < query_starts + several)
        return Lists(
            blocks=decode_blocks(table, lengths, capacity, window),
            lengths=lengths,
            decode_tokens=jnp.where(new == 1, query_starts, tokens),
            tiles=prefill_tiles(table, query_starts, several, num_computed, padded, capacity),
            several=jnp.any(inside, axis=1),
        )

    count = jnp.max(jnp.where(num_new > 0, rounds, 0)) + 1
    return Rounds(count=count, lists=jax.vmap(of_round)(jnp.arange(-(-rows * most // room))))


def paged_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: Cache,
    layer: Array,
    rounds: Rounds,
    *,
    scale: float,
    window: int | None,
    logit_cap: float | None,
    interpret: bool,
) -> tuple[Array, Cache]:
    """As dispatch.paged_attention. q: [T, N, H]; k, v: [T, K, H]; cache: [L, P, 2, page, W], donated; layer: i32 []."""
    tokens, heads, size = q.shape
    simulated = pltpu.InterpretParams() if interpret else False
    # a masked key has weight 0, and 0 * NaN would reach other rows
    k, v, scales = round_tokens(*(jnp.where(jnp.isfinite(x), x, 0) for x in (k, v)), cache)
    layer = jnp.reshape(layer, (1,)).astype(jnp.int32)
    limits = {"scale": scale, "window": window, "logit_cap": logit_cap}
    wide = q.reshape(tokens, heads * size)

    def attend(number: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
        out, cache = carry
        now = jax.tree_util.tree_map(lambda x: x[number], rounds.lists)
        if tokens > 1:
            padding = ((0, -tokens % TILE), (0, 0))
            padded = [jnp.pad(x, padding) for x in (wide, k, v)]
            factors = None if scales is None else jnp.pad(scales, padding)
            found, cache = prefill_attention(
                *padded, cache, layer, now.tiles, size=size, new_scales=factors, interpret=simulated, **limits
            )
            out = jnp.where(now.several[:, None], found[:tokens], out)
        mine = jnp.minimum(now.decode_tokens, tokens - 1)
        factors = None if scales is None else scales[mine]
        found, cache = decode_attention(
            q[mine], k[mine], v[mine], cache, layer, now.blocks, now.lengths,
            new_scales=factors, interpret=simulated, **limits,
        )  # fmt: skip
        return out.at[now.decode_tokens].set(found.reshape(-1, heads * size), mode="drop"), cache

    start = (jnp.zeros_like(wide), cache)
    if rounds.lists.lengths.shape[0] == 1:
        out, cache = attend(jnp.int32(0), start)
    else:
        out, cache = lax.fori_loop(0, rounds.count, attend, start)
    return out.reshape(tokens, heads, size), cache


def cache_shape(
    num_layers: int, num_pages: int, page_tokens: int, num_kv_heads: int, head_size: int
) -> tuple[int, ...]:
    """[L, P, 2, page, W]: a token's heads lie side by side. Raises ValueError for other pages than of 128 tokens."""
    if page_tokens != LANES:
        raise ValueError(f"pages of {page_tokens} tokens: the TPU kernels take pages of {LANES}")
    return (num_layers, num_pages, 2, page_tokens, num_kv_heads * head_size)


def int8_pages(num_layers: int, num_pages: int, page_tokens: int, num_kv_heads: int, head_size: int) -> Int8Pages:
    """The shapes of a cache of int8, ShapeDtypeStructs; ranks share the heads' axes, 4 of codes and 2 of scales."""
    codes = cache_shape(num_layers, num_pages, page_tokens, num_kv_heads, head_size)
    scales = (num_layers, num_pages, 2 * num_kv_heads, page_tokens)
    return Int8Pages(
        codes=jax.ShapeDtypeStruct(codes, jnp.int8),  # type: ignore[arg-type]
        scales=jax.ShapeDtypeStruct(scales, jnp.bfloat16),  # type: ignore[arg-type]
    )
