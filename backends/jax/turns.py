"""Several decode turns in one program: the forward program and the sampler in a loop on the device.

A turn feeds each row the token that it sampled last. A row that has ended (stop id, all its outputs, or all its turns)
is parked on the slot that takes padded writes, whose pages are the null page; the loop ends with the last row, of all
replicas: they go the same way, and one without rows parks. Traced by compile.py, once a bucket of decode steps.
Letters: S rows · V vocabulary · k most turns of a step · n top entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from backends.jax import sample
from backends.jax.batch import Shape, places_of, unpack
from backends.jax.split import DATA
from backends.jax.tables import Rows, Tables, has_ended
from engine.step import LAST_TOKEN
from pallas_kernels.int8_pages import Cache

CONTROLS = 3
"""Ints beside the packed plan: turns to take, and equal on all replicas Use bits and the most rows that sample."""
ENDS = 3
"""Columns of the results behind the tokens: how many, a flag of logits that are not finite, one of bad token ids."""


@dataclass(frozen=True, slots=True)
class Loop:
    """What a program of several turns is made for."""

    forward: Callable[..., Any]  # of the same shape, see forward.py
    shape: Shape
    most: int  # k
    null_slot: int
    vocab_size: int
    sampled: sample.Sampled
    replicas: int = 1

    def any_live(self, live: Array) -> Array:
        """bool []: a row of some replica goes on. live: bool [S]."""
        found = jnp.any(live)
        return found if self.replicas == 1 else lax.pmax(found.astype(jnp.int32), DATA) > 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """What one turn hands to the next."""

    turn: Array  # i32 []
    live: Array  # bool [S]
    goes_on: Array  # bool [], the same on all replicas
    packed: Array  # i32, as batch.py packs a step of one turn
    caches: list[Cache]
    rows: Rows
    tables: Tables
    tokens: Array  # i32 [S, k]
    ends: Array  # i32 [S, ENDS]
    scores: tuple[Array, Array, Array, Array]  # f32 [S, k], i32 [S, k], i32 [S, k, n], f32 [S, k, n]


def several_turns(
    params: dict[str, Any],
    caches: list[Cache],
    rows: Rows,
    tables: Tables,
    packed: Array,
    control: Array,
    *,
    loop: Loop,
) -> tuple[list[Cache], Rows, Tables, Array, tuple[Array, Array, Array, Array]]:
    """-> (caches, rows, tables, i32 [S, k + ENDS] tokens and what ENDS says, their raw log-probabilities)."""
    size, most = loop.shape.rows, loop.most
    # opening rows leaves -1 there; parked rows begin at 0
    rows = replace(rows, length=rows.length.at[loop.null_slot].set(0))
    scores = sample.empty_scores(size * most, loop.sampled.num_top)
    live = (jnp.arange(size) < unpack(packed, loop.shape)["num_rows"]) & (control[0] > 0)
    begin = Carry(
        turn=jnp.int32(0),
        live=live,
        goes_on=loop.any_live(live),
        packed=packed,
        caches=caches,
        rows=rows,
        tables=tables,
        tokens=jnp.zeros((size, most), jnp.int32),
        ends=jnp.zeros((size, ENDS), jnp.int32),
        scores=jax.tree_util.tree_map(lambda part: part.reshape(size, most, *part.shape[1:]), scores),
    )
    end = lax.while_loop(lambda now: now.goes_on, lambda now: one_turn(params, now, control, loop), begin)
    return end.caches, end.rows, end.tables, jnp.concatenate([end.tokens, end.ends], axis=1), end.scores


def one_turn(params: dict[str, Any], now: Carry, control: Array, loop: Loop) -> Carry:
    """One decode step of all rows. control: i32 [CONTROLS]."""
    # params of a turn: else XLA makes what it can of them in front of the loop, on a CPU a copy of the embedding table
    params, packed = lax.optimization_barrier((params, now.packed))
    step = unpack(packed, loop.shape)
    slots, size = step["slots"], loop.shape.rows
    caches, rows, logits, _, flags = loop.forward(params, now.caches, now.rows, packed)
    mask = jnp.zeros((size, -(-loop.vocab_size // 32)), jnp.uint32)  # late masks come with steps of one turn
    asked = jnp.concatenate([control[1:], slots])
    rows, tables, tokens, scores = sample.sampling(
        logits[:, : loop.vocab_size], rows, now.tables, asked, mask, shape=loop.sampled
    )
    ends = jnp.stack([now.ends[:, 0] + 1, now.ends[:, 1] | flags[1], now.ends[:, 2] | flags[2]], axis=1)
    live = now.live & ~has_ended(rows, tables, slots, tokens) & (now.turn + 1 < control[0])
    return Carry(
        turn=now.turn + 1,
        live=live,
        goes_on=loop.any_live(live),
        packed=next_turn(packed, live, loop),
        caches=caches,
        rows=rows,
        tables=tables,
        tokens=lax.dynamic_update_index_in_dim(now.tokens, tokens, now.turn, 1),
        ends=jnp.where(now.live[:, None], ends, now.ends),
        scores=jax.tree_util.tree_map(
            lambda whole, part: lax.dynamic_update_index_in_dim(whole, part, now.turn, 1), now.scores, scores
        ),
    )


def next_turn(packed: Array, live: Array, loop: Loop) -> Array:
    """The plan one token on: rows that are not live parked, no page-table changes left."""
    at, step, shape = places_of(loop.shape), unpack(packed, loop.shape), loop.shape
    slots = jnp.where(live, step["slots"], loop.null_slot)
    changes = {
        "slots": slots,
        "logit_slots": slots,
        "num_computed": jnp.where(live, step["num_computed"] + 1, 0),
        "token_ids": jnp.full(shape.tokens, LAST_TOKEN, jnp.int32),
        "positions": jnp.where(live[step["token_rows"]], step["positions"] + 1, 0),
    }
    parked = jnp.full(shape.deltas, loop.null_slot, jnp.int32)
    changes |= {f"delta_slots{group}": parked for group in range(shape.groups)}
    for name, values in changes.items():
        packed = packed.at[at[name]].set(values)
    return packed
