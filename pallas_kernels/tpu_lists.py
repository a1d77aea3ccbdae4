"""The work lists of the TPU kernels, made on the device from a step's rows, once a step and group.

The host uploads no list: rows, lengths and page tables are on the device already, lengths there are the truth, and a
list is a cumulative sum and a few gathers. Letters: S rows · T tokens · B entries of a list.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.tpu_decode import LANES, Blocks
from pallas_kernels.tpu_prefill import BLOCK_PAGES, TILE, Tiles


def expand(counts: Array, capacity: int) -> tuple[Array, Array, Array, Array]:
    """counts: i32 [S] entries of each row -> (number i32 [1], rows i32 [B], each entry's index in its row i32 [B],
    where rows begin i32 [S]), rows in order; entries from the number on belong to the last row."""
    ends = jnp.cumsum(counts)
    entry = jnp.arange(capacity, dtype=jnp.int32)
    rows = jnp.sum(ends[None, :] <= entry[:, None], axis=1, dtype=jnp.int32)
    rows = jnp.minimum(rows, counts.shape[0] - 1)
    starts = ends - counts
    return jnp.minimum(ends[-1:], capacity), rows, entry - starts[rows], starts


def decode_blocks(table: Array, lengths: Array, capacity: int, window: int | None = None) -> Blocks:
    """Pages of rows with one new token, those before the window left out. table: i32 [S, max_pages]; lengths: i32 [S]
    keys that a row sees, its new one included, 0 for other rows."""
    first = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0) // LANES
    counts = jnp.where(lengths > 0, (lengths + LANES - 1) // LANES - first, 0)
    count, rows, nth, _ = expand(counts, capacity)
    columns = jnp.clip(first[rows] + nth, 0, table.shape[1] - 1)
    return Blocks(count=count, rows=rows, pages=table[rows, columns], starts=columns * LANES)


def prefill_tiles(
    table: Array, query_starts: Array, num_new: Array, num_computed: Array, tokens: int, capacity: int
) -> Tiles:
    """Pairs, touched pages and page lists of rows with several new tokens. table: i32 [S, max_pages]; the others i32
    [S], num_new 0 for other rows; tokens: T; capacity: entries for pages."""
    rows = num_new.shape[0]
    live = num_new > 0
    first = query_starts // TILE
    counts = jnp.where(live, (query_starts + num_new - 1) // TILE - first + 1, 0)
    num_pairs, pair_rows, nth, _ = expand(counts, tokens // TILE + rows)
    first_page, ends = num_computed // LANES, num_computed + num_new
    touched = jnp.where(live, (ends - 1) // LANES - first_page + 1, 0)
    num_writes, write_rows, nth_write, _ = expand(touched, tokens // LANES + 2 * rows)
    listed = jnp.where(live, -(-ends // (BLOCK_PAGES * LANES)) * BLOCK_PAGES, 0)  # whole blocks
    _, page_rows, nth_page, page_starts = expand(listed, capacity)
    pages = table[page_rows, jnp.clip(nth_page, 0, table.shape[1] - 1)]
    return Tiles(
        num_pairs=num_pairs,
        pair_tiles=first[pair_rows] + nth,
        pair_rows=pair_rows,
        num_writes=num_writes,
        write_rows=write_rows,
        write_columns=first_page[write_rows] + nth_write,
        query_starts=query_starts,
        num_new=num_new,
        num_computed=num_computed,
        page_starts=page_starts,
        pages=pages,
    )
