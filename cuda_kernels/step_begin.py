"""The first launch of a captured decode step: from slots to token ids, positions, rope turns and embedded rows.

One program a row. What the host did not give (-1) is taken from the device's own tables, so a step can be queued
before the one before it has answered. Page-table changes of the step ride along: attention runs in later launches.
Called by backends/torch. Needs triton. Letters: S rows · D width · R rotary size · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Ropes = Sequence[tuple[Tensor, float]]
"""inv_freq f32 [R / 2] and the scale of cos and sin, one a kind of rope"""
Deltas = Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]
"""slots, columns and pages, i32 [S], and the page table [max_slots + 1, max_pages] they are written to, one a group"""


@dataclass(frozen=True, slots=True)
class DecodeStart:
    """What a decode step begins with, on the device."""

    ids: Tensor  # i32 [S] in [0, V)
    bad: Tensor  # i32 [S] 1 where the id was outside
    positions: Tensor  # i32 [S]
    lengths: Tensor  # i32 [S] keys that attention sees, this step's included: positions + 1
    turns: tuple[tuple[Tensor, Tensor], ...]  # cos and sin, f32 [S, R / 2], one a kind of rope
    x: Tensor  # [S, D] of the table's dtype


def begin_decode(
    slots: Tensor,
    token_ids: Tensor,
    computed: Tensor,
    last_token: Tensor,
    length: Tensor,
    ropes: Ropes,
    embed: Tensor,
    embedding_scale: float = 1.0,
    deltas: Deltas = (),
    bad: Tensor | None = None,
) -> DecodeStart:
    """Begin a decode step in one launch.

    slots, token_ids, computed: i32 [S]; -1 in the last two stands for last_token[slot] and length[slot];
    last_token, length: [max_slots + 1]; embed: [V, D]; embedding_scale: rounded to the table's dtype before use;
    deltas: entries that say nothing name a place of the padding slot; bad: i32 [S] to write.
    """
    rows, (vocab, width) = len(slots), embed.shape
    check_columns(rows, (token_ids, computed), (slots, embed), deltas)
    device = slots.device
    bad = torch.empty(rows, dtype=torch.int32, device=device) if bad is None else bad
    numbers = torch.empty(3, rows, dtype=torch.int32, device=device)
    halves = [len(inv_freq) for inv_freq, _ in ropes]
    turns = tuple(
        (torch.empty(rows, half, dtype=torch.float32, device=device), torch.empty(rows, half, device=device))
        for half in halves
    )
    x = torch.empty(rows, width, dtype=embed.dtype, device=device)
    scale = float(torch.tensor(embedding_scale, dtype=embed.dtype))
    block = triton.next_power_of_2(max((width, *halves)))
    inv_freqs, turn_scales = columns_of(ropes, 2)
    cosines, sines = columns_of(turns, 2)
    delta_slots, delta_columns, delta_pages, tables = columns_of(deltas, 4)
    if rows:
        begin_kernel[(rows,)](
            slots, token_ids, computed, last_token, length, numbers, bad, embed, x, vocab, scale,
            inv_freqs, turn_scales, cosines, sines, delta_slots, delta_columns, delta_pages, tables,
            PAGES=tuple(table.shape[1] for table in tables), HALVES=tuple(halves),
            WIDTH=width, BLOCK=triton.next_power_of_2(width), SCALED=scale != 1.0,
            num_warps=min(max(block // 512, 1), 8),
        )  # fmt: skip
    return DecodeStart(ids=numbers[0], bad=bad, positions=numbers[1], lengths=numbers[2], turns=turns, x=x)


def columns_of(rows: Sequence[tuple[Any, ...]], width: int) -> tuple[tuple[Any, ...], ...]:
    """The rows' first parts, their second parts, and so on; `width` empty tuples for no rows."""
    return tuple(zip(*rows, strict=True)) if rows else ((),) * width


def check_columns(rows: int, columns: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], deltas: Deltas) -> None:
    """Raise ValueError unless the columns have a number a row and everything lies together."""
    told = [*columns, *(part for delta in deltas for part in delta[:3])]
    if any(len(part) != rows for part in told):
        raise ValueError(f"{rows} slots; token_ids, computed and deltas of {[len(part) for part in told]}")
    if not all(part.is_contiguous() for part in (*told, *others, *(delta[3] for delta in deltas))):
        raise ValueError("embed, slots, token_ids, computed and deltas must be contiguous")


@triton.jit(do_not_specialize=["vocab"], do_not_specialize_on_alignment=["slots", "token_ids", "computed", "bad"])
def begin_kernel(
    slots,  # i32 [S]
    token_ids,  # i32 [S]
    computed,  # i32 [S]
    last_token,  # [max_slots + 1]
    length,  # [max_slots + 1]
    numbers,  # i32 [3, S]: ids, positions, lengths
    bad,  # i32 [S]
    embed,  # [V, D]
    x,  # [S, D]
    vocab,
    scale,  # of x
    inv_freqs,  # tuples, one entry a kind of rope: f32 [R / 2]
    turn_scales,
    cosines,  # f32 [S, R / 2]
    sines,
    delta_slots,  # tuples, one entry a group: i32 [S]
    delta_columns,
    delta_pages,
    tables,  # i32 [max_slots + 1, max_pages]
    PAGES: tl.constexpr,  # max_pages of each
    HALVES: tl.constexpr,  # R / 2 of each
    WIDTH: tl.constexpr,  # D
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    row, rows = tl.program_id(0), tl.num_programs(0)
    slot = tl.load(slots + row)
    token = tl.load(token_ids + row)
    before = tl.load(computed + row)
    token = tl.where(token == -1, tl.load(last_token + slot).to(tl.int32), token)
    before = tl.where(before == -1, tl.load(length + slot).to(tl.int32), before)
    known = tl.minimum(tl.maximum(token, 0), vocab - 1)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    values = tl.load(embed + known.to(tl.int64) * WIDTH + at, mask=inside, other=0.0)
    if SCALED:
        values = (values.to(tl.float32) * scale).to(values.dtype)
    tl.store(x + row.to(tl.int64) * WIDTH + at, values, mask=inside)
    tl.store(numbers + row, known)
    tl.store(numbers + rows + row, before)
    tl.store(numbers + 2 * rows + row, before + 1)  # attention sees this step's key too
    tl.store(bad + row, (token != known).to(tl.int32))
    for group in tl.static_range(len(tables)):
        cell = tl.load(delta_slots[group] + row) * PAGES[group] + tl.load(delta_columns[group] + row)
        tl.store(tables[group] + cell, tl.load(delta_pages[group] + row))
    for kind in tl.static_range(len(inv_freqs)):
        turn(before, row, inv_freqs[kind], turn_scales[kind], cosines[kind], sines[kind], HALVES[kind])


@triton.jit
def turn(position, row, inv_freq, scale, cosines, sines, HALF: tl.constexpr):
    """cos and sin of a position; both are of full range, the angle reaches 131072."""
    BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    pair = tl.arange(0, BLOCK)
    angles = position.to(tl.float32) * tl.load(inv_freq + pair, mask=pair < HALF, other=0.0)
    tl.store(cosines + row * HALF + pair, tl.cos(angles) * scale, mask=pair < HALF)
    tl.store(sines + row * HALF + pair, tl.sin(angles) * scale, mask=pair < HALF)
