"""Paged attention of a whole step on a TPU: rows of one new token by tpu_decode, rows of several by tpu_prefill.

Letters: T tokens · S rows · N query heads · K KV heads · H head size · W = K * H · L layers · P pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_decode import LANES, Blocks, decode_attention
from pallas_kernels.tpu_lists import decode_blocks, prefill_tiles
from pallas_kernels.tpu_prefill import BLOCK_PAGES, TILE, Tiles, prefill_attention

MAX_LISTED = 1 << 15
"""Most pages of a list: three numbers each must fit in scalar memory (1 MiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """The work of one group in one step."""

    blocks: Blocks
    lengths: Array  # i32 [S] keys seen by rows of one new token, 0 for other rows
    decode_tokens: Array  # i32 [S] their tokens in the step, T for other rows
    tiles: Tiles | None  # None where no row can have several


def make_lists(
    table: Array, query_starts: Array, num_new: Array, num_computed: Array, tokens: int, window: int | None
) -> Lists:
    """table: i32 [S, max_pages]; query_starts, num_new, num_computed: i32 [S], num_new 0 in padding; tokens: T."""
    rows, columns = table.shape
    one = num_new == 1
    lengths = jnp.where(one, num_computed + 1, 0)
    capacity = rows * (columns + BLOCK_PAGES)
    if capacity > MAX_LISTED:
        raise ValueError(
            f"{rows} rows of {columns} pages: {capacity} entries do not fit in scalar memory, at most {MAX_LISTED} do"
        )
    several = jnp.where(one, 0, num_new)
    padded = -(-tokens // TILE) * TILE
    return Lists(
        blocks=decode_blocks(table, lengths, capacity, window),
        lengths=lengths,
        decode_tokens=jnp.where(one, query_starts, tokens),
        tiles=prefill_tiles(table, query_starts, several, num_computed, padded, capacity) if tokens > 1 else None,
    )


def paged_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: Array,
    layer: Array,
    lists: Lists,
    *,
    scale: float,
    window: int | None,
    logit_cap: float | None,
    interpret: bool,
) -> tuple[Array, Array]:
    """As dispatch.paged_attention. q: [T, N, H]; k, v: [T, K, H]; cache: [L, P, 2, page, W], donated; layer: i32 []."""
    tokens, heads, size = q.shape
    width = k.shape[1] * size
    simulated = pltpu.InterpretParams() if interpret else False
    # a masked key has weight 0, and 0 * NaN would reach other rows
    k, v = (jnp.where(jnp.isfinite(x), x, 0).astype(cache.dtype).reshape(tokens, width) for x in (k, v))
    layer = jnp.reshape(layer, (1,)).astype(jnp.int32)
    limits = {"scale": scale, "window": window, "logit_cap": logit_cap}
    wide = q.reshape(tokens, heads * size)
    if lists.tiles is not None:
        padding = ((0, -tokens % TILE), (0, 0))
        padded = [jnp.pad(x, padding) for x in (wide, k, v)]
        out, cache = prefill_attention(*padded, cache, layer, lists.tiles, size=size, interpret=simulated, **limits)
        wide = out[:tokens]
    mine = jnp.minimum(lists.decode_tokens, tokens - 1)
    found, cache = decode_attention(
        q[mine], k[mine], v[mine], cache, layer, lists.blocks, lists.lengths, interpret=simulated, **limits
    )
    out = wide.at[lists.decode_tokens].set(found.reshape(-1, heads * size), mode="drop")
    return out.reshape(tokens, heads, size), cache


def cache_shape(
    num_layers: int, num_pages: int, page_tokens: int, num_kv_heads: int, head_size: int
) -> tuple[int, ...]:
    """[L, P, 2, page, W]: a token's heads lie side by side. Raises ValueError for other pages than of 128 tokens."""
    if page_tokens != LANES:
        raise ValueError(f"pages of {page_tokens} tokens: the TPU kernels take pages of {LANES}")
    return (num_layers, num_pages, 2, page_tokens, num_kv_heads * head_size)
