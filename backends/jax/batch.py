"""A StepPlan as one int32 array, and back as named slices inside a program.

`pack` runs on the host for every step: it copies everything it needs out of the plan's arrays, so that the engine may
write them again, and derives the attention work list. `unpack` runs while a program is traced.
Letters: T padded tokens · S padded rows · D page-table changes a group that a forward program takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from jax import Array

from engine.step import I32, PageDelta, StepPlan, query_starts
from pallas_kernels.dispatch import TILE_TOKENS, max_tiles

EXTRA_DELTAS = 32
"""Page-table changes beyond one a row that ride along with a step; more are written by a program of their own."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one forward program."""

    tokens: int  # T
    rows: int  # S
    groups: int

    @property
    def deltas(self) -> int:
        return self.rows + EXTRA_DELTAS

    @property
    def tiles(self) -> int:
        return max_tiles(self.tokens, self.rows)


def fields(shape: Shape) -> dict[str, int]:
    """Lengths of the packed parts, in order."""
    rows, tokens = shape.rows, shape.tokens
    sizes = {"num_rows": 1, "num_tokens": 1, "num_tiles": 1, "num_logits": 1, "greedy": 1}
    sizes |= dict.fromkeys(("slots", "num_computed", "num_new", "starts", "order"), rows)
    # logits are computed for the rows that sample alone, one after another
    sizes |= {"logit_rows": rows, "logit_slots": rows}
    sizes |= dict.fromkeys(("token_ids", "positions", "token_rows"), tokens)
    sizes |= {"tile_rows": shape.tiles, "tile_starts": shape.tiles}
    for group in range(shape.groups):
        sizes |= {f"delta_{part}{group}": shape.deltas for part in ("slots", "columns", "pages")}
    return sizes


def packed_size(shape: Shape) -> int:
    return sum(fields(shape).values())


def places_of(shape: Shape) -> dict[str, slice]:
    """Where each part lies in the packed array."""
    sizes = fields(shape)
    ends = accumulate(sizes.values())
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def unpack(packed: Array, shape: Shape) -> dict[str, Array]:
    """packed: i32 [packed_size] -> named slices; numbers have shape []."""
    parts: dict[str, Array] = {}
    at = 0
    for name, size in fields(shape).items():
        scalar = size == 1 and name.startswith(("num_t", "num_r", "num_l", "greedy"))
        parts[name] = packed[at] if scalar else packed[at : at + size]
        at += size
    return parts


class Packer:
    """Packs the plans of one program shape."""

    def __init__(self, shape: Shape, null_slot: int) -> None:
        self.shape = shape
        self._template = np.zeros(packed_size(shape), np.int32)
        self._at = places_of(shape)
        for name in self._at:
            if name in ("slots", "logit_slots") or name.startswith("delta_slots"):
                self._template[self._at[name]] = null_slot

    def pack(self, plan: StepPlan, deltas: tuple[PageDelta | None, ...], greedy: bool) -> I32:
        """A new array: nothing of the plan is aliased. deltas: one a group, each within Shape.deltas."""
        out = self._template.copy()
        at = self._at
        num_rows, num_tokens = plan.num_rows, plan.num_tokens
        starts = query_starts(plan)

        def put(name: str, values: I32) -> None:
            start = at[name].start
            out[start : start + len(values)] = values

        sampling = np.flatnonzero(plan.num_logits)
        out[at["num_rows"]], out[at["num_tokens"]], out[at["num_logits"]] = num_rows, num_tokens, len(sampling)
        out[at["greedy"]] = greedy
        put("slots", plan.slots)
        put("num_computed", plan.num_computed)
        put("num_new", plan.num_new)
        put("starts", starts[:-1])
        put("order", row_order(plan, self.shape.rows))
        put("logit_rows", plan.logit_rows)
        put("logit_slots", plan.slots[sampling])
        put("token_ids", plan.token_ids)
        put("positions", plan.positions[0])
        if num_tokens > num_rows:
            put("token_rows", np.repeat(np.arange(num_rows, dtype=np.int32), plan.num_new))
            tile_rows, tile_starts = tiles(plan, starts)
            out[at["num_tiles"]] = len(tile_rows)
            put("tile_rows", tile_rows)
            put("tile_starts", tile_starts)
        else:
            put("token_rows", np.arange(num_rows, dtype=np.int32))
        for group, delta in enumerate(deltas):
            if delta is not None:
                put(f"delta_slots{group}", delta.slots)
                put(f"delta_columns{group}", delta.columns)
                put(f"delta_pages{group}", delta.pages)
        return out


def row_order(plan: StepPlan, rows: int) -> I32:
    """Rows by length, padding last: rows of like length are attended together. i32 [S]."""
    order = np.arange(rows, dtype=np.int32)
    if plan.num_rows > 1:
        order[: plan.num_rows] = np.argsort(plan.num_computed, kind="stable")
    return order


def tiles(plan: StepPlan, starts: I32) -> tuple[I32, I32]:
    """(row, first token) of each tile of queries, of the rows with more than one token."""
    rows, firsts = [], []
    for row in np.flatnonzero(plan.num_new > 1).tolist():
        first = np.arange(starts[row], starts[row + 1], TILE_TOKENS, dtype=np.int32)
        firsts.append(first)
        rows.append(np.full(len(first), row, np.int32))
    none = np.zeros(0, np.int32)
    return np.concatenate([none, *rows]), np.concatenate([none, *firsts])
