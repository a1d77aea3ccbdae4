"""Persistent device tables: one row a slot, changed only by packed deltas inside programs.

Written when a row is opened (its former tenant's row is overwritten whole), read and advanced by forward and sampling
programs, donated to every program that changes them. The row after the last slot takes padded writes. Two records, so
that a forward program is handed only what it reads. Letters: W = ceil(V / 32) · n entries of one update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.runner import SamplerLimits

IN_PROMPT = 1 << 30
"""Bit of `counts` that says an id stands in the prompt; the bits below count generated ids."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What every step reads and advances; all arrays [slots + 1, ...]."""

    pages: tuple[Array, ...]  # a group: i32 [slots + 1, max_pages]
    length: Array  # i32, tokens whose keys and values are in the pages
    last_token: Array  # i32
    num_outputs: Array  # i32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tables:
    """What the sampler reads; all arrays [slots + 1, ...]."""

    temperature: Array  # f32
    top_p: Array  # f32
    min_p: Array  # f32
    top_k: Array  # i32
    presence: Array  # f32
    frequency: Array  # f32
    repetition: Array  # f32
    min_tokens: Array  # i32
    max_outputs: Array  # i32, several turns on the device end with so many
    seed: Array  # u32 [.., 2] low word, high word
    stop_ids: Array  # i32 [.., max_stop_ids], -1 pads
    bias_ids: Array  # i32 [.., max_logit_bias], -1 pads
    bias_values: Array  # f32 [.., max_logit_bias]
    has_allowed: Array  # i32
    allowed: Array  # u32 [.., W]
    bad_prefix: Array  # i32 [.., max_bad_words, max_bad_word_len - 1], right aligned, -1 pads
    bad_last: Array  # i32 [.., max_bad_words], -1 pads
    tail: Array  # i32 [.., max_bad_word_len - 1] ids generated last, right aligned, -2 pads
    counts: Array  # i32 [.., V] generated ids, and the IN_PROMPT bit


def table_shapes(slots: int, vocab_size: int, max_pages: tuple[int, ...], limits: SamplerLimits) -> tuple[Rows, Tables]:
    """The tables as shapes and dtypes."""
    i32, f32 = np.int32, np.float32

    def of(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((slots + 1, *shape), dtype)

    rows = Rows(
        pages=tuple(of(i32, count) for count in max_pages), length=of(i32), last_token=of(i32), num_outputs=of(i32)
    )
    tables = Tables(
        **{name: of(f32) for name in SCALARS_F32},
        **{name: of(i32) for name in SCALARS},
        seed=of(np.uint32, 2),
        stop_ids=of(i32, limits.max_stop_ids),
        bias_ids=of(i32, limits.max_logit_bias),
        bias_values=of(f32, limits.max_logit_bias),
        allowed=of(np.uint32, -(-vocab_size // 32)),
        bad_prefix=of(i32, limits.max_bad_words, limits.max_bad_word_len - 1),
        bad_last=of(i32, limits.max_bad_words),
        tail=of(i32, limits.max_bad_word_len - 1),
        counts=of(i32, vocab_size),
    )
    return rows, tables


SCALARS = ("top_k", "min_tokens", "max_outputs", "has_allowed")
SCALARS_F32 = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
OPEN_INTS = 3 + len(SCALARS) + 2
"""Columns before the stop ids in the ints of `open_rows`: slot, length, num_outputs, SCALARS, seed (two words)."""


def open_rows(rows: Rows, tables: Tables, ints: Array, floats: Array) -> tuple[Rows, Tables]:
    """Begin n tenancies. ints: i32 [n, OPEN_INTS + max_stop_ids]; floats: f32 [n, SCALARS_F32]."""
    slots = ints[:, 0]
    rows = replace(
        rows,
        length=rows.length.at[slots].set(ints[:, 1]),
        num_outputs=rows.num_outputs.at[slots].set(ints[:, 2]),
        last_token=rows.last_token.at[slots].set(0),
    )
    changes = {name: getattr(tables, name).at[slots].set(ints[:, 3 + i]) for i, name in enumerate(SCALARS)}
    for i, name in enumerate(SCALARS_F32):
        changes[name] = getattr(tables, name).at[slots].set(floats[:, i])
    seed = jax.lax.bitcast_convert_type(ints[:, OPEN_INTS - 2 : OPEN_INTS], jnp.uint32)
    return rows, replace(
        tables,
        **changes,
        seed=tables.seed.at[slots].set(seed),
        stop_ids=tables.stop_ids.at[slots].set(ints[:, OPEN_INTS:]),
        # what only some tenants have, and open_* programs fill after this
        bad_last=tables.bad_last.at[slots].set(-1),
        tail=tables.tail.at[slots].set(-2),
        bias_ids=tables.bias_ids.at[slots].set(-1),
    )


def open_bias(tables: Tables, slot: Array, ids: Array, values: Array) -> Tables:
    """Logit bias of one slot. slot: i32 [1]; ids: i32 [max_logit_bias]; values: f32 [max_logit_bias]."""
    return replace(
        tables,
        bias_ids=tables.bias_ids.at[slot[0]].set(ids),
        bias_values=tables.bias_values.at[slot[0]].set(values),
    )


def open_allowed(tables: Tables, slot: Array, words: Array) -> Tables:
    """Allowed ids of one slot, as bits. slot: i32 [1]; words: u32 [W]."""
    return replace(tables, allowed=tables.allowed.at[slot[0]].set(words))


def open_bad_words(tables: Tables, slot: Array, prefix: Array, last: Array, tail: Array) -> Tables:
    """Bad words of one slot, and the ids it generated last. Shapes as the tables', less the first axis."""
    return replace(
        tables,
        bad_prefix=tables.bad_prefix.at[slot[0]].set(prefix),
        bad_last=tables.bad_last.at[slot[0]].set(last),
        tail=tables.tail.at[slot[0]].set(tail),
    )


def open_counts(tables: Tables, slot: Array, reset: Array, ids: Array, num_prompt: Array) -> Tables:
    """Count a piece of one slot's history.

    slot: i32 [1]; reset: i32 [1], 1 = forget the row first; ids: i32 [n], V pads; num_prompt: i32 [1], how many of the
    ids are prompt.
    """
    row = jnp.where(reset[0] != 0, 0, tables.counts[slot[0]])
    is_prompt = jnp.arange(ids.shape[0]) < num_prompt[0]
    prompt = jnp.zeros_like(row).at[jnp.where(is_prompt, ids, row.shape[0])].max(IN_PROMPT, mode="drop")
    row = row.at[jnp.where(is_prompt, row.shape[0], ids)].add(1, mode="drop") | prompt
    return replace(tables, counts=tables.counts.at[slot[0]].set(row))


def set_pages(rows: Rows, group: int, slots: Array, columns: Array, pages: Array) -> Rows:
    """table[slots[i], columns[i]] = pages[i]; i32 [n] each, the row after the last slot pads."""
    changed = list(rows.pages)
    changed[group] = rows.pages[group].at[slots, columns].set(pages, mode="drop")
    return replace(rows, pages=tuple(changed))


def has_ended(rows: Rows, tables: Tables, slots: Array, tokens: Array) -> Array:
    """bool [n]: the token that was just counted in `rows` is the last of its row. slots, tokens: i32 [n]."""
    outputs = rows.num_outputs[slots]
    stops = jnp.any(tables.stop_ids[slots] == tokens[:, None], axis=1) & (outputs >= tables.min_tokens[slots])
    return stops | (outputs >= tables.max_outputs[slots])


def advance(rows: Rows, slots: Array, tokens: Array) -> Rows:
    """What every sampled token changes. slots: i32 [n], the row after the last slot pads; tokens: i32 [n]."""
    return replace(
        rows, last_token=rows.last_token.at[slots].set(tokens), num_outputs=rows.num_outputs.at[slots].add(1)
    )


def remember(tables: Tables, slots: Array, tokens: Array) -> Tables:
    """The histories that penalties and bad words read. slots, tokens: i32 [n]."""
    tail = jnp.concatenate([tables.tail[slots][:, 1:], tokens[:, None]], axis=1)
    return replace(tables, tail=tables.tail.at[slots].set(tail), counts=tables.counts.at[slots, tokens].add(1))
