"""A StepPlan as one padded array for torch-xla, where every new shape is a compile: T and S are of the buckets.

Packed on the host at submit, nothing of the plan is aliased; backends/torch/xla.py takes it apart on the device.
Letters: T tokens · S rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from backends.torch.xla_tables import Call
from engine.step import I32, PageDelta, StepPlan, query_starts

EXTRA_DELTAS = 32
"""Page-table changes beyond one a row that ride along with a step; more are written by a program of their own."""

COPIES = 4
"""Page copies of one call."""

SCALARS = ("num_rows", "num_tokens", "num_tiles", "greedy")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one forward program."""

    tokens: int  # T
    rows: int  # S
    groups: int
    tiles: int  # most tiles of queries that such a step has
    tile_tokens: int  # query tokens of a tile

    @property
    def deltas(self) -> int:
        return self.rows + EXTRA_DELTAS


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """What the programs of one step are called with."""

    shape: Shape
    packed: I32
    sampling: I32  # slots of the sampling rows, [S], the padding slot where there is none
    scored: tuple[I32, I32] | None  # prompt logprobs: tokens of the step, targets
    greedy: bool  # the forward program samples
    calls: list[Call]  # table changes, before the forward program
    copies: list[tuple[int, I32]]  # (pool, i32 [3, n] sources, targets, tokens), behind them


def fields(shape: Shape) -> dict[str, int]:
    """Lengths of the packed parts, in order."""
    sizes = dict.fromkeys(SCALARS, 1)
    sizes |= dict.fromkeys(("slots", "num_computed", "num_new", "starts", "order"), shape.rows)
    # logits are computed for the rows that sample alone, one after another
    sizes |= dict.fromkeys(("logit_rows", "logit_slots"), shape.rows)
    sizes |= dict.fromkeys(("token_ids", "positions", "token_rows"), shape.tokens)
    sizes |= dict.fromkeys(("tile_rows", "tile_starts"), shape.tiles)
    for group in range(shape.groups):
        sizes |= {f"delta_{part}{group}": shape.deltas for part in ("slots", "columns", "pages")}
    return sizes


def unpack(packed: Tensor, shape: Shape) -> dict[str, Tensor]:
    """packed: i32 [sum of fields] -> named slices; scalars have shape []."""
    parts = dict(zip(fields(shape), packed.split(list(fields(shape).values())), strict=True))
    return parts | {name: parts[name][0] for name in SCALARS}


class Packer:
    """Packs the plans of one forward program."""

    def __init__(self, shape: Shape, null_slot: int) -> None:
        self.shape = shape
        self._null_slot = null_slot
        sizes = fields(shape)
        ends = np.cumsum(list(sizes.values()))
        self._at = {name: int(end) - size for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self._template = np.zeros(ends[-1], np.int32)
        for name, start in self._at.items():
            if name in ("slots", "logit_slots") or name.startswith("delta_slots"):
                self._template[start : start + sizes[name]] = null_slot

    def pack(
        self, plan: StepPlan, deltas: Sequence[PageDelta | None], greedy: bool, calls: Sequence[Call] = ()
    ) -> Padded:
        """deltas: one a group, each within Shape.deltas."""
        out, starts = self._template.copy(), query_starts(plan)
        rows, sampling = plan.num_rows, np.flatnonzero(plan.num_logits)
        tile_rows, tile_starts = tiles(plan, starts, self.shape.tile_tokens)
        parts: dict[str, I32 | int] = {
            "num_rows": rows,
            "num_tokens": plan.num_tokens,
            "num_tiles": len(tile_rows),
            "greedy": int(greedy),
            "slots": plan.slots,
            "num_computed": plan.num_computed,
            "num_new": plan.num_new,
            "starts": starts[:-1],
            "order": row_order(plan, self.shape.rows),
            "logit_rows": plan.logit_rows,
            "logit_slots": plan.slots[sampling],
            "token_ids": plan.token_ids,
            "positions": plan.positions[0],
            "token_rows": np.repeat(np.arange(rows, dtype=np.int32), plan.num_new),
            "tile_rows": tile_rows,
            "tile_starts": tile_starts,
        }
        for group, delta in enumerate(deltas):
            if delta is not None:
                parts |= {f"delta_{part}{group}": getattr(delta, part) for part in ("slots", "columns", "pages")}
        for name, values in parts.items():
            some = np.atleast_1d(np.asarray(values, np.int32))
            out[self._at[name] : self._at[name] + len(some)] = some
        slots = np.full(self.shape.rows, self._null_slot, np.int32)
        slots[: len(sampling)] = plan.slots[sampling]
        scored = plan.prompt_logprobs
        return Padded(
            shape=self.shape,
            packed=out,
            sampling=slots,
            scored=None if scored is None else (scored.token_idx.copy(), scored.targets.copy()),
            greedy=greedy,
            calls=list(calls),
            copies=copies_of(plan),
        )


def row_order(plan: StepPlan, rows: int) -> I32:
    """Rows by length, padding last: rows of like length are attended together. i32 [S]."""
    order = np.arange(rows, dtype=np.int32)
    order[: plan.num_rows] = np.argsort(plan.num_computed, kind="stable")
    return order


def tiles(plan: StepPlan, starts: I32, size: int) -> tuple[I32, I32]:
    """(row, first token) of each tile of queries, of the rows with more than one token."""
    rows, firsts = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for row in np.flatnonzero(plan.num_new > 1).tolist():
        firsts.append(np.arange(starts[row], starts[row + 1], size, dtype=np.int32))
        rows.append(np.full(len(firsts[-1]), row, np.int32))
    return np.concatenate(rows), np.concatenate(firsts)


def copies_of(plan: StepPlan) -> list[tuple[int, I32]]:
    """(pool, i32 [3, COPIES] of sources, targets, tokens) of a plan's page copies."""
    if plan.copies is None:
        return []
    found, parts = [], np.stack([plan.copies.source, plan.copies.target, plan.copies.tokens])
    for pool in np.unique(plan.copies.pool).tolist():
        chosen = parts[:, plan.copies.pool == pool]
        for start in range(0, chosen.shape[1], COPIES):
            piece = np.zeros((3, COPIES), np.int32)  # padding copies no token of the null page onto itself
            piece[:, : chosen[:, start : start + COPIES].shape[1]] = chosen[:, start : start + COPIES]
            found.append((pool, piece))
    return found
