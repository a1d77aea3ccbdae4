"""A StepPlan as tensors on the device: everything is copied out of the plan before `submit` returns.

Letters: T tokens · S rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backends.torch.tables import Tables
from cuda_kernels.dispatch import Work, decodes_in_one_call
from cuda_kernels.paged_attention import Gather, Span, decode_groups, gathers, spans
from engine.specs.cache import CacheLayout
from engine.step import I32, StepPlan, query_starts


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows and tokens of one step. Lists are the host's; tensors are on the device, i64."""

    starts: list[int]  # [S]
    num_new: list[int]  # [S]
    num_computed: list[int]  # [S]
    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    token_rows: Tensor  # [T]
    index: Tensor  # [T] each token's index in its sequence
    slots: Tensor  # [S]
    logit_rows: Tensor  # [L]


def pack(plan: StepPlan, tables: Tables) -> Batch:
    """One host array, one copy to the device."""
    starts = query_starts(plan)[:-1]
    rows = np.repeat(np.arange(plan.num_rows), plan.num_new)
    index = np.arange(plan.num_tokens) - starts[rows] + plan.num_computed[rows]
    parts = (plan.token_ids, plan.positions[0], rows, index, plan.slots, plan.logit_rows)
    packed = tables.to_device(np.concatenate([np.asarray(part, np.int64) for part in parts]))
    sizes = [len(part) for part in parts]
    tokens, positions, token_rows, token_index, slots, logit_rows = packed.split(sizes)
    return Batch(
        starts=starts.tolist(),
        num_new=plan.num_new.tolist(),
        num_computed=plan.num_computed.tolist(),
        token_ids=tokens,
        positions=positions,
        token_rows=token_rows,
        index=token_index,
        slots=slots,
        logit_rows=logit_rows,
    )


@dataclass(frozen=True, slots=True)
class Ends:
    """The tokens that a step's last layer takes, each the newest of its row; padding is of the padding slot."""

    places: Tensor  # i32 [3, Z] tokens of the step, slots, lengths
    num_computed: list[int]  # [Z]


def newest_rows(plan: StepPlan) -> I32 | None:
    """The rows that logits are wanted of, [L], if of each it is its newest token alone."""
    at = plan.logit_rows
    newest = np.cumsum(plan.num_new) - 1
    rows = np.minimum(np.searchsorted(newest, at), plan.num_rows - 1)
    alone = (newest[rows] == at).all() and (rows[1:] > rows[:-1]).all()
    return rows.astype(np.int32) if alone else None


def newest(batch: Batch, ends: Ends) -> Batch:
    """The step of those tokens alone."""
    tokens, slots, lengths = ends.places.long()
    each = torch.arange(len(tokens), device=tokens.device)
    return Batch(
        starts=list(range(len(tokens))),
        num_new=[1] * len(tokens),
        num_computed=ends.num_computed,
        token_ids=batch.token_ids[tokens],
        positions=batch.positions[tokens],
        token_rows=each,
        index=lengths - 1,
        slots=slots,
        logit_rows=each,
    )


def works_of(
    batch: Batch, tables: Tables, layout: CacheLayout, dtype: torch.dtype, cache_dtype: torch.dtype
) -> list[Work]:
    """The attention work of each group. dtype: of the activations."""
    device = batch.slots.device
    rows = (batch.starts, batch.num_new, batch.num_computed)
    one_each = all(new == 1 for new in batch.num_new)
    works = []
    for group, pages in zip(layout.groups, tables.pages, strict=True):
        table = pages[batch.slots]  # [S, max_pages]
        pool = layout.pools[group.pool]
        token_bytes = pool.page_bytes // (pool.num_layers * pool.page_tokens)
        one_call = one_each and decodes_in_one_call(device, dtype, cache_dtype, pool.head_size)
        decodes: tuple[Gather | Span, ...] = ()
        if not one_call:
            in_place = spans(table, *rows, group.page_tokens, group.spec.window, token_bytes)
            others = decode_groups(*rows, device, in_place)
            decodes = (*in_place.values(), *gathers(others, table, group.page_tokens, group.spec.window, dtype))
        page = table[batch.token_rows, batch.index // group.page_tokens]
        works.append(
            Work(
                page_tokens=group.page_tokens,
                page_table=table,
                query_starts=batch.starts,
                num_new=batch.num_new,
                num_computed=batch.num_computed,
                write_at=page * group.page_tokens + batch.index % group.page_tokens,
                index=batch.index,
                one_call=one_call,
                decodes=decodes,
            )
        )
    return works


def known_ids(batch: Batch, tables: Tables, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(token ids [T] in [0, V), flag bool [S] of rows that had any outside). -1 takes the device's own last token."""
    last = tables.last_token[batch.slots[batch.token_rows]]
    ids = torch.where(batch.token_ids == -1, last, batch.token_ids)
    outside = (ids < 0) | (ids >= vocab_size)
    return ids.clamp(0, vocab_size - 1), rows_with(batch, outside)


def rows_with(batch: Batch, flags: Tensor) -> Tensor:
    """bool [S]: rows with any flagged token. flags: bool [T]."""
    if len(batch.starts) == len(flags):
        return flags
    counts = torch.zeros(len(batch.starts), dtype=torch.int64, device=flags.device)
    return counts.index_add_(0, batch.token_rows, flags.long()) > 0
