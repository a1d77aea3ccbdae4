"""Greedy sampling and the end of a captured decode step, two launches: `scan` over the logits, `end_decode` per row.

`scan` cuts each row into tiles, so that one row keeps the whole GPU busy, and leaves a tile's best id as one integer
key; the largest key of a row is its answer, whatever the order of the tiles. Called by backends/torch; semantics of
docs/contract.md, section 5: NaN counts as nothing, the first id among equals wins. Needs triton.
Letters: S rows · V vocabulary · C tiles of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # small: 16 programs of a multiprocessor keep more loads in flight than few large ones
LAST_ID = tl.constexpr(0x7FFFFFFF)  # a key's low word is this xor the id: smaller ids are larger keys


@dataclass(frozen=True, slots=True)
class Scan:
    """What is known of each tile of the logits."""

    keys: Tensor  # i64 [S, C] order of the best value, then that of its id
    unfit: Tensor  # i32 [S, C] 1 where a value is NaN or +inf


def scan(logits: Tensor, tile: int = TILE) -> Scan:
    """Read the logits once. logits: f32, bf16 or f16 [S, V]."""
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits {tuple(logits.shape)} of strides {logits.stride()}: rows must be contiguous")
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, tile)
    keys = torch.empty(rows, tiles, dtype=torch.int64, device=logits.device)
    unfit = torch.empty(rows, tiles, dtype=torch.int32, device=logits.device)
    if rows:
        scan_kernel[(tiles, rows)](logits, keys, unfit, vocab, logits.stride(0), TILE=tile, num_warps=tile // 1024 * 2)
    return Scan(keys=keys, unfit=unfit)


def argmax(logits: Tensor) -> Tensor:
    """The first index of the largest value of each row, i64 [S]; NaN counts as nothing. logits: [S, V]."""
    found = scan(logits)
    rows, tiles = found.keys.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        pick_kernel[(rows,)](found.keys, tokens, TILES=tiles, BLOCK=triton.next_power_of_2(tiles), num_warps=1)
    return tokens


def end_decode(
    found: Scan,
    slots: Tensor,
    last_token: Tensor,
    num_outputs: Tensor,
    packed: Tensor,
    bad: Tensor,
    *,
    broken: Tensor | None = None,
    lengths: Tensor | None = None,
    length: Tensor | None = None,
    tokens: Tensor | None = None,
) -> None:
    """Write each row's token to the tables and to the integers that go to the host.

    slots: [S]; last_token, num_outputs, length: [max_slots + 1], whose last row is that of padding and stays as it is;
    packed: i32 [3 * S or more] takes tokens, unfit, bad, and broken where it is given; bad, broken: [S] flags;
    lengths: [S] tokens in the cache behind this step, for `length`; tokens: i64 [S] already sampled; None: the greedy.
    """
    rows, tiles = found.keys.shape
    parts = 3 + (broken is not None)
    if len(slots) != rows or len(bad) != rows or packed.numel() < parts * rows or packed.dtype != torch.int32:
        raise ValueError(f"{len(slots)} slots, {len(bad)} flags, packed {tuple(packed.shape)} for {rows} rows")
    if (lengths is None) != (length is None):
        raise ValueError("lengths and length come together")
    if rows:
        end_kernel[(rows,)](
            found.keys, found.unfit, slots, last_token, num_outputs, packed,
            as_bytes(bad), bad if broken is None else as_bytes(broken),
            slots if lengths is None else lengths, slots if length is None else length,
            slots if tokens is None else tokens, len(last_token) - 1,
            TILES=tiles, BLOCK=triton.next_power_of_2(tiles), BROKEN=broken is not None, LENGTH=length is not None,
            GIVEN=tokens is not None, num_warps=1,
        )  # fmt: skip


def as_bytes(flags: Tensor) -> Tensor:
    return flags.view(torch.uint8) if flags.dtype == torch.bool else flags


@triton.jit
def sortable(x):
    """int32 in the order of the floats; -0 and 0 are equal. x: f32, no NaN."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def keyed(x, ids):
    """Order of the values, then of smaller ids, as one int64."""
    return (sortable(x).to(tl.int64) << 32) | (ids ^ LAST_ID).to(tl.int64)


@triton.jit
def best_key(x, ids):
    """The key of the largest of x and the first of its ids."""
    top = tl.max(x)
    return keyed(top, tl.min(tl.where(x == top, ids, LAST_ID)))


@triton.jit(do_not_specialize=["vocab"])
def scan_kernel(
    logits,  # [S, V]
    keys,  # i64 [S, C]
    unfit,  # i32 [S, C]
    vocab,
    stride,  # of a row
    TILE: tl.constexpr,
):
    tile, row = tl.program_id(0), tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    x_is_unfit = (x < float("inf")) == 0  # +inf and NaN are not less than +inf; -inf is lawful
    x = tl.where(x == x, x, -float("inf"))
    at = row * tl.num_programs(0) + tile
    tl.store(keys + at, best_key(x, ids))
    tl.store(unfit + at, tl.max(x_is_unfit.to(tl.int32), 0))


@triton.jit
def best_id(keys, row, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row's keys, i64 [S, C]."""
    tile = tl.arange(0, BLOCK)
    key = tl.max(tl.load(keys + row * TILES + tile, mask=tile < TILES, other=-(2**63)), 0)
    return ((key & LAST_ID) ^ LAST_ID).to(tl.int32)


@triton.jit
def pick_kernel(
    keys,  # i64 [S, C]
    tokens,  # i64 [S]
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    tl.store(tokens + row, best_id(keys, row, TILES, BLOCK).to(tl.int64))


@triton.jit(
    do_not_specialize=["padding"],
    do_not_specialize_on_alignment=["slots", "packed", "bad", "broken", "lengths", "tokens"],
)
def end_kernel(
    keys,  # i64 [S, C]
    unfit,  # i32 [S, C]
    slots,  # [S]
    last_token,  # [max_slots + 1]
    num_outputs,  # [max_slots + 1]
    packed,  # i32 [3 or 4, S]
    bad,  # [S]
    broken,  # [S]
    lengths,  # [S]
    length,  # [max_slots + 1]
    tokens,  # i64 [S]
    padding,  # the slot of rows that are none
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    BROKEN: tl.constexpr,
    LENGTH: tl.constexpr,
    GIVEN: tl.constexpr,
):
    row, rows = tl.program_id(0), tl.num_programs(0)
    slot = tl.load(slots + row).to(tl.int32)
    if GIVEN:
        token = tl.load(tokens + row).to(tl.int32)
    else:
        token = best_id(keys, row, TILES, BLOCK)
    tile = tl.arange(0, BLOCK)
    flags = tl.load(unfit + row * TILES + tile, mask=tile < TILES, other=0)
    tl.store(packed + row, token)
    tl.store(packed + rows + row, tl.max(flags, 0))
    tl.store(packed + 2 * rows + row, tl.load(bad + row).to(tl.int32))
    if BROKEN:
        tl.store(packed + 3 * rows + row, tl.load(broken + row).to(tl.int32))
    if slot != padding:
        tl.store(last_token + slot, token.to(last_token.dtype.element_ty))
        tl.store(num_outputs + slot, tl.load(num_outputs + slot) + 1)
        if LENGTH:
            tl.store(length + slot, tl.load(lengths + row).to(length.dtype.element_ty))
