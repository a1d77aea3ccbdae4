"""Causal attention whose result of a token depends on its own sequence alone: for --batch-invariant.

One kernel for prompt tokens and decode tokens, called by gpu_attention.py after rope_cache.py has written this step's
keys and values. A query attends to its keys from key 0 on, in chunks of CHUNK keys; a chunk's online softmax begins
anew, and the chunks' sums are joined in their order. So it does not matter which queries share a tile, in which step
the keys were written, or whether one program walks all chunks or each is another's: `spread` gives the chunks of
one-token rows to several programs where there are few rows, and the last one to finish joins them.
Letters: T tokens · S rows · N query heads · K KV heads · G = N / K · H head size · P pages · W tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_kernels.attention_tiles import (
    add_sinks,
    for_products,
    fp16_products,
    key_offsets,
    laid_out,
    page_of,
    query_tiles,
    score_factors,
    scores_of,
)

CHUNK = 512  # keys
LANES = 64  # queries times heads of a tile
BLOCK_C = 64
PROGRAMS = 264  # that are worth having: two a multiprocessor of an H200


def query_tile(num_heads: int, num_kv_heads: int) -> int:
    """Query tokens of a tile."""
    return max(1, LANES // (num_heads // num_kv_heads))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """What a launch has to do: (row, first query) of each tile, i32 [W, 2] on the device."""

    many: Tensor  # of rows with several tokens, the longest first
    singles: Tensor  # of rows with one token


def make_tiles(num_new: np.ndarray, num_computed: np.ndarray, q_tile: int, device: torch.device) -> Tiles:
    """num_new, num_computed: [S] tokens of each row in this step, and those before."""
    many, lone = query_tiles(num_new, num_computed, q_tile)
    tiles, singles = laid_out(many, np.stack((lone, np.zeros_like(lone)), 1), device)
    return Tiles(many=tiles, singles=singles)


def spread(rows: int, kv_heads: int, max_keys: int) -> int:
    """Programs that share the chunks of a one-token row."""
    return max(1, min(PROGRAMS // max(1, rows * kv_heads), triton.cdiv(max_keys, CHUNK)))


def scratch_values(max_rows: int, num_heads: int, kv_heads: int, head_size: int, max_keys: int) -> int:
    """Most f32 values that the partial results of a launch of up to max_rows one-token rows need."""
    shared = [rows for rows in range(1, max_rows + 1) if spread(rows, kv_heads, max_keys) > 1]
    return max(shared, default=0) * triton.cdiv(max_keys, CHUNK) * num_heads * (head_size + 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """Of one stream. Counters are 0 between launches."""

    partials: Tensor  # f32
    counters: Tensor  # i32 [max rows * K]


def make_scratch(
    max_rows: int, num_heads: int, kv_heads: int, head_size: int, max_keys: int, device: torch.device
) -> Scratch:
    """Enough for any launch over a cache of these sizes. max_keys: the columns of the page table in tokens."""
    values = scratch_values(max_rows, num_heads, kv_heads, head_size, max_keys)
    return Scratch(
        partials=torch.empty(max(1, values), dtype=torch.float32, device=device),
        counters=torch.zeros(max_rows * kv_heads, dtype=torch.int32, device=device),
    )


@triton.jit
def joined(top, weight, total, more_top, more_weight, more_total):
    """Two parts of an online softmax as one. A part without keys, whose top is -1e30, changes nothing."""
    higher = tl.maximum(top, more_top)
    kept, share = tl.exp2(top - higher), tl.exp2(more_top - higher)
    total = total * kept[:, None] + more_total * share[:, None]
    return higher, weight * kept + more_weight * share, total


@triton.jit
def chunk_of(
    q,  # [M, H]
    k_pages,
    v_pages,
    table,
    positions,  # i32 [M] of the queries
    low,  # keys [low, high)
    high,
    kv_head,
    factor,
    cap,
    NUM_KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Online softmax over the keys [low, high), from nothing -> (largest scores [M], weights [M], sums [M, H])."""
    top = tl.full([q.shape[0]], -1e30, tl.float32)
    weight = tl.zeros([q.shape[0]], tl.float32)
    total = tl.zeros([q.shape[0], BLOCK_H], tl.float32)
    keys = tl.arange(0, BLOCK_C)
    dims = tl.arange(0, BLOCK_H)
    mask = (dims < HEAD)[None, :]
    ahead = page_of(table, low, high, PAGE, BLOCK_C)
    for at in tl.range(low, high, BLOCK_C, num_stages=STAGES):
        page = ahead
        ahead = page_of(table, at + BLOCK_C, high, PAGE, BLOCK_C)
        places = key_offsets(table, page, keys, at, high, kv_head, NUM_KV_HEADS, PAGE, HEAD, BLOCK_C)
        k = tl.load(k_pages + places[:, None] + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_pages + places[:, None] + dims[None, :], mask=mask, other=0.0)
        s = scores_of(q, tl.trans(k.to(q.dtype)), factor, cap, CAP)
        position = at + keys
        seen = position[None, :] <= positions[:, None]
        if WINDOW > 0:
            seen = seen & (position[None, :] > positions[:, None] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        kept = tl.exp2(top - higher)
        weight = weight * kept + tl.sum(p, 1)
        total = tl.dot(p.to(q.dtype), v.to(q.dtype), total * kept[:, None], input_precision="ieee")
        top = higher
    return top, weight, total


@triton.jit(
    do_not_specialize=["table_stride", "most_chunks"],
    do_not_specialize_on_alignment=["page_table", "slots", "query_starts", "lengths", "tiles"],
)
def invariant_kernel(
    q,  # [T, N, H]
    out,  # [T, N, H]
    k_pages,  # [P, K, page, H]
    v_pages,
    page_table,  # i32 [max_slots + 1, max_pages]
    slots,  # i32 [S]
    query_starts,  # i32 [S + 1]
    lengths,  # i32 [S]
    tiles,  # i32 [W, 2]
    sinks,  # [N]
    partials,  # f32 [W * K, most_chunks, G * (H + 2)]
    counters,  # i32 [W * K]
    table_stride,
    most_chunks,
    factor,
    cap,
    v_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,  # power of two >= Q_TILE * G
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    Q_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    STAGES: tl.constexpr,
    FP16: tl.constexpr,
    SPREAD: tl.constexpr,  # several programs share a tile; its row has one token
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    CELLS: tl.constexpr = GROUP * (HEAD + 2)
    tile, kv_head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    member, members = tl.program_id(1), tl.num_programs(1)
    row, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    start = tl.load(query_starts + row)
    new = tl.load(query_starts + row + 1) - start
    computed = tl.load(lengths + row) - new
    end = computed + tl.minimum(first + Q_TILE, new)  # keys that any query of the tile sees
    first_chunk = 0
    if WINDOW > 0:
        first_chunk = tl.maximum(0, computed + first + 1 - WINDOW) // CHUNK
    last_chunk = tl.cdiv(end, CHUNK)
    chunks = last_chunk - first_chunk
    if SPREAD:  # noqa: SIM102  (a constant alone: what is under it is left out)
        if member >= chunks:
            return
    table = page_table + tl.load(slots + row).to(tl.int64) * table_stride

    lane = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_H)
    query = first + lane // GROUP
    real = (lane < Q_TILE * GROUP) & (query < new)
    wanted = real[:, None] & (dims < HEAD)[None, :]
    head = kv_head * GROUP + lane % GROUP
    places = ((start + query).to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD + dims[None, :]
    queries = for_products(tl.load(q + places, mask=wanted, other=0.0), FP16)
    positions = computed + tl.minimum(query, new - 1)  # lanes beyond the row repeat its last query's mask

    top = tl.full([BLOCK_M], -1e30, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    pair = tl.program_id(0)
    lanes_of = partials + pair.to(tl.int64) * most_chunks * CELLS + lane
    sums_of = (lanes_of + lane * (HEAD - 1) + 2 * GROUP)[:, None] + dims[None, :]
    for chunk in tl.range(first_chunk + member, last_chunk, members):
        low, high = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, end)
        its_top, its_weight, its_total = chunk_of(
            queries, k_pages, v_pages, table, positions, low, high, kv_head, factor, cap,
            NUM_KV_HEADS, HEAD, BLOCK_H, BLOCK_C, PAGE, WINDOW, CAP, STAGES,
        )  # fmt: skip
        top, weight, total = joined(top, weight, total, its_top, its_weight, its_total)
        if SPREAD:  # noqa: SIM102
            if chunks > 1:
                at = chunk * CELLS
                tl.store(lanes_of + at, its_top, mask=real)
                tl.store(lanes_of + at + GROUP, its_weight, mask=real)
                tl.store(sums_of + at, its_total, mask=wanted)
    if SPREAD:  # noqa: SIM102
        if chunks > 1:
            tl.debug_barrier()  # all threads have stored before one thread says so
            if tl.atomic_add(counters + pair, 1, sem="acq_rel") < tl.minimum(members, chunks) - 1:
                return
            tl.store(counters + pair, 0)
            top = tl.full([BLOCK_M], -1e30, tl.float32)
            weight = tl.zeros([BLOCK_M], tl.float32)
            total = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
            for chunk in tl.range(first_chunk, last_chunk):
                at = chunk * CELLS
                its_top = tl.load(lanes_of + at, mask=real, other=-1e30, cache_modifier=".cg")
                its_weight = tl.load(lanes_of + at + GROUP, mask=real, other=0.0, cache_modifier=".cg")
                its_total = tl.load(sums_of + at, mask=wanted, other=0.0, cache_modifier=".cg")
                top, weight, total = joined(top, weight, total, its_top, its_weight, its_total)
    weight, total = add_sinks(sinks, head, top, weight, total, SINKS)
    tl.store(out + places, (total * (v_scale / weight)[:, None]).to(out.dtype.element_ty), mask=wanted)


def attention(
    q: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    slots: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    tiles: Tiles,
    scratch: Scratch,
    scale: float,
    window: int | None = None,
    logit_cap: float | None = None,
    sinks: Tensor | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Causal attention of rows of any length -> [T, N, H]; this step's keys and values are in the pages already.

    q: [T, N, H]; cache: [L, 2, P, K, page, H]; page_table: i32 [max_slots + 1, max_pages]; slots, lengths: i32 [S];
    query_starts: i32 [S + 1]; sinks: [N]; kv_scales: an e4m3 cache keeps x / scale. Tokens of no row stay undefined.
    """
    _, _, _, kv_heads, page, head_size = cache.shape
    num_heads = q.shape[1]
    if q.shape[2] != head_size or num_heads % kv_heads or not q.is_contiguous():
        raise ValueError(f"q must be [T, N, {head_size}], contiguous, N a multiple of {kv_heads}, not {q.shape}")
    out = torch.empty_like(q)
    max_keys = page_table.shape[1] * page
    most_chunks = triton.cdiv(max_keys, CHUNK)
    factor, cap = score_factors(scale, logit_cap, kv_scales[0])
    q_tile = query_tile(num_heads, kv_heads)
    block_h = triton.next_power_of_2(head_size)
    wide = block_h * q.element_size() > 256
    for its, members in ((tiles.many, 1), (tiles.singles, spread(len(tiles.singles), kv_heads, max_keys))):
        if not len(its):
            continue
        needed = len(its) * most_chunks * num_heads * (head_size + 2) if members > 1 else 0
        if needed > scratch.partials.numel() or (members > 1 and len(its) * kv_heads > scratch.counters.numel()):
            raise ValueError(f"the scratch is too small for {len(its)} rows of {num_heads} heads")
        invariant_kernel[(len(its) * kv_heads, members)](
            q, out, cache[layer, 0], cache[layer, 1], page_table, slots, query_starts, lengths, its, sinks,
            scratch.partials, scratch.counters, page_table.stride(0), most_chunks, factor, cap, kv_scales[1],
            NUM_HEADS=num_heads, NUM_KV_HEADS=kv_heads, HEAD=head_size, BLOCK_H=block_h,
            BLOCK_M=max(LANES, triton.next_power_of_2(q_tile * (num_heads // kv_heads))), BLOCK_C=BLOCK_C,
            CHUNK=CHUNK, Q_TILE=q_tile, PAGE=page, WINDOW=window or 0, CAP=logit_cap is not None,
            SINKS=sinks is not None, STAGES=2 if wide else 3, FP16=fp16_products(q, cache), SPREAD=members > 1,
            num_warps=8 if wide else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
