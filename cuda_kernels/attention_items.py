"""What each program of decode attention has to do: a list made once a step, for all layers of a group.

Rows with many keys are split, so that programs are even; how, depends on all lengths, which are on the device. The
list is written by a launch of its own, at the step's beginning: attention reads it before the kernel in front of it has
ended (attention_decode.py), so it must not be written by that one. Called by whoever makes a step's GpuWork.
Letters: S rows · K KV heads · C keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_OF_SM = 3  # that run at once
FEW_OF_SM = 2  # programs of a step of few rows: more keep the next product's programs out
MAX_WAVES = 2  # of any plan
BLOCKS_OF_ROWS = (16, 64, 256, 1024, 8192)  # few, since each is a kernel of its own
RECORD = tl.constexpr(8)  # i32: ticket, token, slot, keys, split, splits of the row, tiles of a split, unused


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a launch is cut up."""

    block: int = 64  # keys of a tile
    stages: int = 3  # tiles on their way
    warps: int = 4
    merged: int = 16  # splits merged at a time, of 512 values each
    requests: int = 1  # tiles asked of the L2 cache before the queries are made
    early: bool = False  # the first tile is loaded before they are
    split_keys: int = 256  # fewest keys of a split
    waves: int = 2  # splits of long rows, in programs that run at once
    of_sm: int = PROGRAMS_OF_SM
    registers: int | None = None  # of a thread, at most
    lanes: int = 1  # query lanes of a tile, at least; those beyond a KV head's own do nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """The work of a step's rows with one token, for layers of one kind."""

    records: Tensor  # i32 [items, 8]; without splits there is none to do
    rows: int
    window: int | None
    plan: Plan


def plan_for(rows: int, kv_heads: int, row_bytes: int, num_sms: int) -> Plan:
    """row_bytes: of one key, padded to a power of two.

    Where splits can make all programs run at once, they are made for that; else there are so many that the last ones
    weigh little. Measured on an H200 for 8 KV heads of 128 values.
    """
    block, programs = 64 if row_bytes <= 256 else 32, rows * kv_heads
    if programs <= num_sms * FEW_OF_SM:
        return Plan(block=block, waves=1, of_sm=FEW_OF_SM, merged=16, requests=3, early=True, lanes=16)
    # two stages let five programs share a multiprocessor: wanted while one round of programs takes all rows
    if num_sms * PROGRAMS_OF_SM < programs <= num_sms * 5:
        return Plan(block=block, waves=2, merged=4, stages=2, registers=128)
    if row_bytes <= 256:  # small programs, six at once: others' loads are under way while one begins or ends
        return Plan(block=32, waves=2, merged=4, warps=2, registers=168)
    return Plan(block=block, waves=2, merged=4)


def row_bytes_of(cache: Tensor) -> int:
    return triton.next_power_of_2(cache.shape[5]) * cache.element_size()


def block_of_rows(rows: int) -> int:
    return next(size for size in BLOCKS_OF_ROWS if size >= rows)


def class_starts(most_rows: int, kv_heads: int, row_bytes: int, num_sms: int) -> list[int]:
    """The fewest rows of each class that kernels are compiled for, up to most_rows."""
    found: dict[tuple[int, Plan], int] = {}
    for rows in range(1, most_rows + 1):
        found.setdefault((block_of_rows(rows), plan_for(rows, kv_heads, row_bytes, num_sms)), rows)
    return list(found.values())


def item_count(rows: int, kv_heads: int, max_keys: int, num_sms: int, plan: Plan) -> tuple[int, int, int]:
    """(items of the grid, budget, fewest tiles of a split), see find_work."""
    tiles = triton.cdiv(max_keys, plan.block)
    share = triton.cdiv(plan.split_keys, plan.block)
    budget = max(1, num_sms * plan.of_sm * plan.waves // kv_heads)
    return min(rows + budget, rows * triton.cdiv(tiles, share)), budget, share


@triton.jit
def find_work(
    lengths, slots, rows, item, num_rows, budget, fewest_tiles,
    NEW: tl.constexpr, WINDOW: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(row, length, slot, split, splits of the row, tiles of a split) of a work item; row = num_rows: none is left.

    Splits are as long as `budget` of them need to be for all rows.
    """
    lanes = tl.arange(0, BLOCK_S)
    real = lanes < num_rows
    places = lanes
    if not NEW:
        places = tl.load(rows + 2 * lanes, mask=real, other=-1)
        real = real & (places >= 0)
    seen = tl.load(lengths + places, mask=real, other=1)
    held = tl.load(slots + places, mask=real, other=0)  # with the lengths: one wait less
    first_tile = tl.zeros([BLOCK_S], tl.int32)
    if WINDOW > 0:
        first_tile = tl.maximum(0, seen - WINDOW) // BLOCK_C
    if NEW:
        seen -= 1
    tiles = tl.where(real, tl.cdiv(seen, BLOCK_C) - first_tile, 0)
    share = tl.maximum(fewest_tiles, tl.cdiv(tl.sum(tiles, 0), budget))
    # merging two splits takes longer than the tiles that one of them saves
    active = tl.where(tiles <= 2 * fewest_tiles, 1, tl.maximum(1, tl.cdiv(tiles, share)))
    active = tl.where(real, active, 0)
    ends = tl.cumsum(active, 0)
    row = tl.sum(((lanes < num_rows) & (ends <= item)).to(tl.int32), 0)
    mine = lanes == row
    length = tl.sum(tl.where(mine, seen, 0), 0) + (1 if NEW else 0)
    slot = tl.sum(tl.where(mine, held, 0), 0)
    splits = tl.sum(tl.where(mine, active, 0), 0)
    share = tl.cdiv(tl.sum(tl.where(mine, tiles, 0), 0), tl.maximum(1, splits))  # of even size
    split = item - tl.sum(tl.where(mine, ends - active, 0), 0)
    return row, length, slot, split, splits, share


@triton.jit(
    do_not_specialize=["num_rows", "budget", "fewest_tiles"],
    do_not_specialize_on_alignment=["slots", "lengths", "rows"],
)
def items_kernel(
    slots,  # i32 [S]
    lengths,  # i32 [S]
    rows,  # i32 [programs, 2] row and token of the step, or -1 behind the last; without NEW only
    records,  # i32 [items, RECORD]
    num_rows,
    budget,  # splits that all rows together may have beyond one each
    fewest_tiles,  # of a split
    NEW: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,  # power of two >= S
):
    """An item a program."""
    item = tl.program_id(0)
    ticket, length, slot, split, splits, share = find_work(
        lengths, slots, rows, item, num_rows, budget, fewest_tiles, NEW, WINDOW, BLOCK_C, BLOCK_S
    )
    token = ticket
    if not NEW:
        token = tl.load(rows + 2 * ticket + 1, mask=ticket < num_rows, other=0)
    record = records + RECORD * item
    tl.store(record, ticket)
    tl.store(record + 1, token)
    tl.store(record + 2, slot)
    tl.store(record + 3, length)
    tl.store(record + 4, split)
    tl.store(record + 5, splits)
    tl.store(record + 6, share)


def make_items(
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    lengths: Tensor,
    num_sms: int,
    *,
    window: int | None = None,
    rows: Tensor | None = None,
) -> Items:
    """The list of a step, by one launch.

    cache: of the layers, [L, 2, P, K, page, H]; page_table: i32 [max_slots + 1, max_pages]; slots, lengths: i32 [S];
    rows: of a mixed step, i32 [programs, 2], those of one token and where in the step it stands; behind them -1.
    """
    _, _, _, kv_heads, page, _ = cache.shape
    count = slots.shape[0] if rows is None else rows.shape[0]
    plan = plan_for(count, kv_heads, row_bytes_of(cache), num_sms)
    items, budget, share = item_count(count, kv_heads, page_table.shape[1] * page, num_sms, plan)
    records = torch.empty(items, RECORD.value, dtype=torch.int32, device=slots.device)
    items_kernel[(items,)](
        slots, lengths, rows, records, count, budget, share, NEW=rows is None, WINDOW=window or 0, BLOCK_C=plan.block,
        BLOCK_S=block_of_rows(count),
    )  # fmt: skip
    return Items(records=records, rows=count, window=window, plan=plan)
