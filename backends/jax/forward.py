"""The forward program: device tables and a packed plan in; logits, hidden states and changed tables out.

Traced by compile.py, once a token bucket. Greedy steps sample here too, so that they are one program.
Letters: T tokens · S rows · D width · V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from backends.jax import sample
from backends.jax.batch import Shape, unpack
from backends.jax.decoders import Traits, make_decoder
from backends.jax.split import AXIS
from backends.jax.tables import Rows, advance, set_pages
from engine.specs.cache import CacheLayout
from jax_models.decoder import Decoder
from pallas_kernels.dispatch import Cache, Work, make_lists, split_over

HEAD_ROWS = 8
"""Rows of logits computed together on a CPU; padding costs no more than a block."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A mesh, None = that of the program around; how params and caches lie on it: a PartitionSpec for each array."""

    mesh: Mesh | None
    params: Any
    caches: Any


def places(layout: CacheLayout) -> tuple[tuple[int, int, int], ...]:
    """Per layer (group, pool, index of the layer within its group)."""
    found = {
        layer: (index, group.pool, nth)
        for index, group in enumerate(layout.groups)
        for nth, layer in enumerate(group.spec.layers)
    }
    return tuple(found[layer] for layer in range(len(found)))


def split_forward(
    params: dict[str, Any],
    caches: list[Cache],
    rows: Rows,
    packed: Array,
    *,
    traits: Traits,
    shape: Shape,
    spread: Spread,
) -> tuple[list[Cache], Rows, Array, Array, Array]:
    """`forward` on every device of a mesh, each with its part of params and caches. Logits stay split by vocabulary."""
    whole = PartitionSpec()

    def of_rank(params: dict[str, Any], caches: list[Cache], rows: Rows, packed: Array) -> Any:
        with split_over(AXIS, tokens=splits_tokens(traits, shape)):
            return forward(params, caches, rows, packed, traits=traits, shape=shape)

    return jax.shard_map(
        of_rank,
        mesh=spread.mesh,
        # a kernel wants every axis split by hand: beside replicas that of theirs is already
        axis_names={AXIS} if spread.mesh is None else set(spread.mesh.axis_names),
        in_specs=(spread.params, spread.caches, whole, whole),
        out_specs=(spread.caches, whole, PartitionSpec(None, AXIS), whole, whole),
        check_vma=False,
    )(params, caches, rows, packed)


def splits_tokens(traits: Traits, shape: Shape) -> bool:
    """Whether a rank norms and adds its own part of the tokens: sums are scattered, and gathered before products."""
    return 0 < traits.split_tokens <= shape.tokens and shape.tokens % traits.ranks == 0


def forward(
    params: dict[str, Any], caches: list[Cache], rows: Rows, packed: Array, *held: Array, traits: Traits, shape: Shape
) -> tuple[list[Cache], Rows, Array, Array, Array]:
    """-> (caches, rows, logits f32 [S, V], hidden [T, D], i32 [3, S]).

    The last holds: sampled ids and a flag of non-finite logits, both for the sampling rows one after another, and a
    flag of bad token ids, for all rows. held: logits and hidden states of a step before, whose memory this one's take.
    """
    step = unpack(packed, shape)
    decoder = make_decoder(params, traits, shape.tokens)
    for group in range(shape.groups):
        rows = set_pages(rows, group, *(step[f"delta_{part}{group}"] for part in ("slots", "columns", "pages")))
    start = jnp.minimum(step["num_computed"], rows.length[step["slots"]])  # the device's length is the truth
    valid = jnp.arange(shape.tokens) < step["num_tokens"]
    token_ids, bad = check_ids(step, rows, valid, traits.arch.vocab_size)
    token_rows = step["token_rows"]
    inside = jnp.arange(shape.tokens) - step["starts"][token_rows]
    index = start[token_rows] + inside
    positions = step["positions"] + (start - step["num_computed"])[token_rows]
    works = [work_of(group, step, rows, start, index, valid, traits) for group in range(shape.groups)]
    hidden, caches = decoder(token_ids, positions, caches, places(traits.layout), works)
    rows = replace(rows, length=rows.length.at[step["slots"]].set(start + step["num_new"]))
    logits = head_rows(decoder, hidden, step, traits.block_rows)
    logits = hide_padding(logits, traits)
    tokens, broken = greedy(logits, traits.ranks)
    target = jnp.where(step["greedy"] != 0, step["logit_slots"], traits.null_slot)
    rows = advance(rows, target, tokens)
    return caches, rows, logits, hidden, jnp.stack([tokens, broken.astype(jnp.int32), bad])


def hide_padding(logits: Array, traits: Traits) -> Array:
    """Logits f32 [S, V / ranks] of a rank, those of ids that no vocabulary has at -inf."""
    width = logits.shape[1]
    if width * traits.ranks == traits.arch.vocab_size:
        return logits
    return jnp.where(lax.axis_index(AXIS) * width + jnp.arange(width) < traits.arch.vocab_size, logits, -jnp.inf)


def greedy(logits: Array, ranks: int) -> tuple[Array, Array]:
    """The most likely ids i32 [S] over all ranks' logits [S, V / ranks], and bool [S]: a logit is not finite."""
    tokens, broken = sample.likeliest(logits)
    if ranks == 1:
        return tokens, broken
    best = jnp.max(jnp.where(broken[:, None], -jnp.inf, logits), axis=1)
    own = tokens + lax.axis_index(AXIS) * logits.shape[1]
    first = lax.pmin(jnp.where(best == lax.pmax(best, AXIS), own, ranks * logits.shape[1]), AXIS)
    return first, lax.pmax(broken.astype(jnp.int32), AXIS) > 0


def check_ids(step: dict[str, Array], rows: Rows, valid: Array, vocab_size: int) -> tuple[Array, Array]:
    """Token ids i32 [T], those outside the vocabulary clamped, and a flag i32 [S] of the rows that have any."""
    known = step["token_ids"]
    last = rows.last_token[step["slots"][step["token_rows"]]]
    token_ids = jnp.where(known == -1, last, known)
    outside = valid & ((token_ids < 0) | (token_ids >= vocab_size))
    bad = jnp.zeros_like(step["slots"]).at[step["token_rows"]].max(outside.astype(jnp.int32))
    return jnp.clip(token_ids, 0, vocab_size - 1), bad


def work_of(
    group: int, step: dict[str, Array], rows: Rows, start: Array, index: Array, valid: Array, traits: Traits
) -> Work:
    """The attention work of one group. start: i32 [S]; index: i32 [T], each token's index in its sequence."""
    page = traits.layout.groups[group].page_tokens
    table = rows.pages[group][step["slots"]]
    column = index // page
    inside = valid & (column < table.shape[1])
    page_id = table[step["token_rows"], jnp.where(inside, column, 0)]
    work = Work(
        kernel=traits.kernels[group],
        page_tokens=page,
        num_rows=step["num_rows"],
        page_table=table,
        query_starts=step["starts"],
        num_new=step["num_new"],
        num_computed=start,
        write_page=jnp.where(inside, page_id, 0),
        write_offset=index % page,
        decode_order=step["order"],
        tile_rows=step["tile_rows"],
        tile_starts=step["tile_starts"],
        num_tiles=step["num_tiles"],
    )
    return make_lists(work, tokens=len(index), window=traits.layout.groups[group].spec.window)


def head_rows(decoder: Decoder, hidden: Array, step: dict[str, Array], block: int) -> Array:
    """Logits of the sampling rows, f32 [S, V]; blocks without such a row are left zero."""
    chosen = hidden[step["logit_rows"]]  # [S, D]
    num_rows = chosen.shape[0]
    if not block:
        return decoder.logits(chosen)
    if num_rows <= block:
        zeros = jnp.zeros((num_rows, decoder.head.shape[0]), jnp.float32)
        return lax.cond(step["num_logits"] > 0, lambda x: decoder.logits(x), lambda _: zeros, chosen)
    padded = jnp.pad(chosen, ((0, -num_rows % block), (0, 0)))

    def fill(index: Array, logits: Array) -> Array:
        part = lax.dynamic_slice(padded, (index * block, 0), (block, padded.shape[1]))
        return lax.dynamic_update_slice(logits, decoder.logits(part), (index * block, 0))

    empty = jnp.zeros((padded.shape[0], decoder.head.shape[0]), jnp.float32)
    blocks = (step["num_logits"] + block - 1) // block
    return lax.fori_loop(0, blocks, fill, empty)[:num_rows]
