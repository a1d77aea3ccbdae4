"""Raw log-probabilities on a GPU: of given ids, their ranks, and the likeliest ids, without sorting. Needs triton.

Two launches: `review` reads the logits once and leaves of each tile its largest value, its sum of exponentials, how
many values beat the target, and the largest of every 64; `rank_kernel`, one program a row, merges them and takes the
likeliest from the few values above a threshold. Twin of backends/torch/sample.score; among equals the smaller id first.
Letters: S rows · V vocabulary · C tiles of a row · B peaks of a row · k likeliest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_kernels.candidates import LOWEST, SPAN, gather, sum_of_tiles
from cuda_kernels.sampling import LAST_ID, keyed

TILE = 4096
ROOM = 512  # candidates of a row
MOST_TOP = 64
SPENT = tl.constexpr(-(2**63))


def score(logits: Tensor, targets: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the targets f32 [S], their ranks i32 [S] from 1, and the likeliest i32, f32 [S, num_top].

    logits: f32, bf16 or f16 [S, V]; targets: [S] in [0, V). Raises ValueError where num_top is over MOST_TOP or V.
    """
    rows, vocab = logits.shape
    if logits.stride(1) != 1 or targets.shape != (rows,) or not 0 <= num_top <= min(MOST_TOP, vocab):
        raise ValueError(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}, num_top {num_top}")
    device, tiles = logits.device, triton.cdiv(vocab, TILE)
    subs = tiles * (TILE // SPAN)
    floats = torch.empty(rows, subs + 2 * tiles + ROOM, dtype=torch.float32, device=device)
    integers = torch.empty(rows, subs + tiles + ROOM, dtype=torch.int32, device=device)
    chosen = torch.empty(rows, dtype=torch.float32, device=device)
    rank = torch.empty(rows, dtype=torch.int32, device=device)
    ids = torch.empty(rows, num_top, dtype=torch.int32, device=device)
    top = torch.empty(rows, num_top, dtype=torch.float32, device=device)
    if rows:
        sizes = {"vocab": vocab, "TILES": tiles, "SUBS": subs, "ROOM": ROOM}
        inputs = (logits, targets.contiguous(), floats, integers)
        review_kernel[(tiles, rows)](*inputs, logits.stride(0), **sizes, TILE=TILE)
        rank_kernel[(rows,)](
            *inputs, chosen, rank, ids, top, num_top, logits.stride(0), **sizes,
            TILE_BLOCK=triton.next_power_of_2(tiles), SUB_BLOCK=triton.next_power_of_2(subs), PIECE=TILE,
        )  # fmt: skip
    return chosen, rank, ids, top


@triton.jit(do_not_specialize_on_alignment=["targets"])
def review_kernel(
    logits,  # [S, V]
    targets,  # [S]
    floats,  # f32 [S, B + 2 C + ROOM]: peaks, tops and sums of the tiles, candidates
    integers,  # i32 [S, B + C + ROOM]: spans that were kept, counts of the tiles, ids of the candidates
    stride,
    vocab: tl.constexpr,
    TILES: tl.constexpr,
    SUBS: tl.constexpr,  # B
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
):
    tile, row = tl.program_id(0), tl.program_id(1)
    PEAKS_HERE: tl.constexpr = TILE // SPAN
    source = logits + row.to(tl.int64) * stride
    target = tl.load(source + tl.load(targets + row)).to(tl.float32)
    ids = tile * TILE + tl.arange(0, PEAKS_HERE)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    value = tl.load(source + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    peaks = tl.max(value, 1)
    top = tl.max(peaks, 0)
    base = tl.where(top > -float("inf"), top, 0.0)
    here = floats + row.to(tl.int64) * (SUBS + 2 * TILES + ROOM)
    tl.store(here + tile * PEAKS_HERE + tl.arange(0, PEAKS_HERE), peaks)
    tl.store(here + SUBS + tile, top)
    tl.store(here + SUBS + TILES + tile, tl.sum(tl.sum(tl.exp(value - base), 1), 0))
    counts = integers + row.to(tl.int64) * (SUBS + TILES + ROOM) + SUBS
    tl.store(counts + tile, tl.sum(tl.sum((value > target).to(tl.int32), 1), 0))


@triton.jit
def largest_under(source, last, vocab, PIECE: tl.constexpr):
    """The largest key of a row that is less than `last`."""
    found = tl.full((), SPENT, tl.int64)
    for first in tl.range(0, vocab, PIECE):
        ids = first + tl.arange(0, PIECE)
        value = tl.load(source + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
        key = keyed(tl.where(value == value, value, -float("inf")), ids)
        found = tl.maximum(found, tl.max(tl.where((ids < vocab) & (key < last), key, SPENT), 0))
    return found


@triton.jit(do_not_specialize=["num_top"], do_not_specialize_on_alignment=["targets"])
def rank_kernel(
    logits,
    targets,
    floats,
    integers,
    chosen,  # f32 [S]
    rank,  # i32 [S]
    top_ids,  # i32 [S, k]
    tops,  # f32 [S, k]
    num_top,  # k
    stride,
    vocab: tl.constexpr,
    TILES: tl.constexpr,
    SUBS: tl.constexpr,
    ROOM: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    SUB_BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    row = tl.program_id(0)
    source = logits + row.to(tl.int64) * stride
    here = floats + row.to(tl.int64) * (SUBS + 2 * TILES + ROOM)
    mine = integers + row.to(tl.int64) * (SUBS + TILES + ROOM)
    tile = tl.arange(0, TILE_BLOCK)
    top = tl.max(tl.load(here + SUBS + tile, mask=tile < TILES, other=-float("inf")), 0)
    norm = top + tl.log(sum_of_tiles(here + SUBS, top, TILES, TILE_BLOCK))
    tl.store(chosen + row, tl.load(source + tl.load(targets + row)).to(tl.float32) - norm)
    tl.store(rank + row, 1 + tl.sum(tl.load(mine + SUBS + tile, mask=tile < TILES, other=0), 0))
    if num_top > 0:
        values, numbers = here + SUBS + 2 * TILES, mine + SUBS + TILES
        _least, found = gather(
            source, 1.0, here, mine, values, numbers, num_top, row * 0 + LOWEST, top, vocab, SUBS, SUB_BLOCK, ROOM
        )
        at = tl.arange(0, ROOM)
        value = tl.load(values + at, mask=at < found, other=0.0)
        keys = tl.where(at < found, keyed(value, tl.load(numbers + at, mask=at < found, other=0)), SPENT)
        on_chip = (found >= num_top) & (found <= ROOM)
        last = tl.full((), 2**63 - 1, tl.int64)
        nth = 0
        while nth < num_top:
            if on_chip:
                last = tl.max(tl.where(keys < last, keys, SPENT), 0)
            else:
                last = largest_under(source, last, vocab, PIECE)
            id = ((last & LAST_ID) ^ LAST_ID).to(tl.int32)
            tl.store(top_ids + row * num_top + nth, id)
            tl.store(tops + row * num_top + nth, tl.load(source + id).to(tl.float32) - norm)
            nth += 1
