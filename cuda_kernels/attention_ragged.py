"""Causal attention of a step whose rows have any number of new tokens, keys and values read from the pages.

gpu_attention.py calls it after rope_cache.py has written this step's keys and values. One launch for all rows with more
than one token, in tiles of queries with the query heads of a KV head packed; rows with one token go through the kernel
of attention_decode.py, which splits their keys. `make_work` lays out both once a step, for all layers.
A row's result does not depend on its neighbours here; of one-token rows see attention_decode.py.
Letters: T tokens · S rows · N query heads · K KV heads · G = N / K · H head size · P pages · W tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cuda_kernels.attention_decode import Workspace, launch, make_workspace
from cuda_kernels.attention_items import Items, make_items
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

PACKED_QUERIES = 64  # queries times heads of a tile: one warp group, and two programs share a multiprocessor


def query_tile(num_heads: int, num_kv_heads: int) -> int:
    """Query tokens of a tile: what `make_work` takes."""
    return max(1, PACKED_QUERIES // (num_heads // num_kv_heads))


@dataclass(slots=True)
class RaggedWork:
    """What the rows of a step have to do, on the device."""

    q_tile: int
    tiles: Tensor  # i32 [W, 2] (row, first query), the longest first; from the first row -1 on nothing is done
    singles: Tensor  # i32 [rows with one token, 2] (row, token of the step); likewise
    workspaces: dict[tuple[int, int], Workspace] = field(default_factory=dict)  # (N, H) -> scratch of the singles
    items: dict[int | None, Items] = field(default_factory=dict)  # window -> what the singles have to do


def make_work(num_new: np.ndarray, num_computed: np.ndarray, q_tile: int, device: torch.device) -> RaggedWork:
    """num_new, num_computed: [S] tokens of each row in this step, and those before."""
    new = np.asarray(num_new, np.int64)
    many, lone = query_tiles(new, num_computed, q_tile)
    starts = np.cumsum(new) - new
    tiles, singles = laid_out(many, np.stack((lone, starts[lone]), 1), device)
    return RaggedWork(q_tile=q_tile, tiles=tiles, singles=singles)


@triton.jit
def attend_tiles(
    q,  # [M, H]
    top,
    weight,
    total,
    k_pages,
    v_pages,
    table,
    positions,  # i32 [M] of the queries
    low,  # keys [low, high)
    high,
    end,  # keys of the row that any query of the tile sees
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
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    TMA: tl.constexpr,
):
    """Online softmax over the keys [low, high), whole tiles; unless MASKED every query sees all of them."""
    keys = tl.arange(0, BLOCK_C)
    dims = tl.arange(0, BLOCK_H)
    ahead = page_of(table, low, high, PAGE, BLOCK_C)
    for at in tl.range(low, high, BLOCK_C, num_stages=STAGES):
        page = ahead
        ahead = page_of(table, at + BLOCK_C, high, PAGE, BLOCK_C)
        if TMA:  # k_pages, v_pages: descriptors of [P * K * page, H]
            place = (page * NUM_KV_HEADS + kv_head) * PAGE + at % PAGE
            k = k_pages.load([place, 0])
            v = v_pages.load([place, 0])
        else:
            places = key_offsets(table, page, keys, at, end, kv_head, NUM_KV_HEADS, PAGE, HEAD, BLOCK_C)
            mask = (dims < HEAD)[None, :]
            k = tl.load(k_pages + places[:, None] + dims[None, :], mask=mask, other=0.0)
            v = tl.load(v_pages + places[:, None] + dims[None, :], mask=mask, other=0.0)
        if CAP or MASKED:
            s = scores_of(q, tl.trans(k.to(ACT)), factor, cap, CAP)
            if MASKED:
                position = at + keys
                seen = position[None, :] <= positions[:, None]
                if WINDOW > 0:
                    seen = seen & (position[None, :] > positions[:, None] - WINDOW)
                s = tl.where(seen, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
        else:
            s = tl.dot(q, tl.trans(k.to(ACT)), input_precision="ieee")
            higher = tl.maximum(top, tl.max(s, 1) * factor)
            p = tl.exp2(s * factor - higher[:, None])
        kept = tl.exp2(top - higher)
        weight = weight * kept + tl.sum(p, 1)
        total = tl.dot(p.to(ACT), v.to(ACT), total * kept[:, None], input_precision="ieee")
        top = higher
    return top, weight, total


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["page_table", "slots", "query_starts", "lengths", "tiles"],
)
def ragged_kernel(
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
    table_stride,
    factor,
    cap,
    v_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,  # power of two >= Q_TILE * G
    BLOCK_C: tl.constexpr,
    Q_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    STAGES: tl.constexpr,
    FP16: tl.constexpr,
    TMA: tl.constexpr,
):
    ACT: tl.constexpr = tl.float16 if FP16 else q.dtype.element_ty
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    tile, kv_head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    row, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    if row < 0:
        return
    start = tl.load(query_starts + row)
    new = tl.load(query_starts + row + 1) - start
    computed = tl.load(lengths + row) - new
    table = page_table + tl.load(slots + row).to(tl.int64) * table_stride

    lane = tl.arange(0, BLOCK_M)
    query = first + lane // GROUP
    wanted = ((lane < Q_TILE * GROUP) & (query < new))[:, None]
    dims = tl.arange(0, BLOCK_H)
    wanted = wanted & (dims < HEAD)[None, :]
    head = kv_head * GROUP + lane % GROUP
    places = ((start + query).to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD + dims[None, :]
    queries = for_products(tl.load(q + places, mask=wanted, other=0.0), FP16)
    positions = computed + tl.minimum(query, new - 1)  # lanes beyond the row repeat its last query's mask

    end = computed + tl.minimum(first + Q_TILE, new)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, computed + first + 1 - WINDOW) // BLOCK_C * BLOCK_C
    open_end = tl.maximum(begin, (computed + first + 1) // BLOCK_C * BLOCK_C)  # all queries see the keys before it
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    top, weight, total = attend_tiles(
        queries, top, weight, total, k_pages, v_pages, table, positions, begin, open_end, end, kv_head, factor, cap,
        NUM_KV_HEADS, HEAD, BLOCK_H, BLOCK_C, PAGE, WINDOW, CAP, WINDOW > 0, STAGES, ACT, TMA,
    )  # fmt: skip
    top, weight, total = attend_tiles(
        queries, top, weight, total, k_pages, v_pages, table, positions, open_end, end, end, kv_head, factor, cap,
        NUM_KV_HEADS, HEAD, BLOCK_H, BLOCK_C, PAGE, WINDOW, CAP, True, STAGES, ACT, TMA,
    )  # fmt: skip
    weight, total = add_sinks(sinks, head, top, weight, total, SINKS)
    tl.store(out + places, (total * (v_scale / weight)[:, None]).to(out.dtype.element_ty), mask=wanted)


def blocks(head_size: int, item_bytes: int) -> tuple[int, int, int]:
    """(keys of a tile, stages, warps) that fit the shared memory, by the bytes of a head. Measured on an H200."""
    row_bytes = triton.next_power_of_2(head_size) * item_bytes
    if row_bytes <= 256:
        return 64, 3, 4
    return (64, 2, 4) if row_bytes <= 512 else (32, 1, 4)


def has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def ragged_attention(
    q: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    slots: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    work: RaggedWork,
    scale: float,
    window: int | None = None,
    logit_cap: float | None = None,
    sinks: Tensor | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    workspace: Workspace | None = None,
) -> Tensor:
    """Causal attention of rows of any length -> [T, N, H]; this step's keys and values are in the pages already.

    q: [T, N, H]; cache: [L, 2, P, K, page, H]; page_table: i32 [max_slots + 1, max_pages]; slots, lengths: i32 [S];
    query_starts: i32 [S + 1]; work: of `make_work` for these rows; sinks: [N]; kv_scales: an e4m3 cache keeps x /
    scale; workspace: scratch for one-token rows, else `work` makes its own. Tokens of no row are left undefined.
    """
    _, _, _, kv_heads, page, head_size = cache.shape
    num_heads = q.shape[1]
    if q.shape[2] != head_size or num_heads % kv_heads or not q.is_contiguous():
        raise ValueError(f"q must be [T, N, {head_size}], contiguous, N a multiple of {kv_heads}, not {q.shape}")
    out = torch.empty_like(q)
    group = num_heads // kv_heads
    block, stages, warps = blocks(head_size, q.element_size())
    if len(work.tiles):
        tma = has_tma(q.device) and page % block == 0 and head_size == triton.next_power_of_2(head_size)
        keys, values = cache[layer, 0], cache[layer, 1]
        if tma:
            keys, values = (
                TensorDescriptor.from_tensor(x.view(-1, head_size), [block, head_size]) for x in (keys, values)
            )
        factor, cap = score_factors(scale, logit_cap, kv_scales[0])
        ragged_kernel[(len(work.tiles) * kv_heads,)](
            q, out, keys, values, page_table, slots, query_starts, lengths, work.tiles, sinks,
            page_table.stride(0), factor, cap, kv_scales[1],
            NUM_HEADS=num_heads, NUM_KV_HEADS=kv_heads, HEAD=head_size, BLOCK_H=triton.next_power_of_2(head_size),
            BLOCK_M=max(16, triton.next_power_of_2(work.q_tile * group)), BLOCK_C=block, Q_TILE=work.q_tile, PAGE=page,
            WINDOW=window or 0, CAP=logit_cap is not None, SINKS=sinks is not None, STAGES=stages, TMA=tma,
            FP16=fp16_products(q, cache),
            num_warps=warps,
        )  # fmt: skip
    if len(work.singles):
        scratch = workspace or work.workspaces.get((num_heads, head_size))
        if scratch is None:
            scratch = make_workspace(len(work.singles), num_heads, head_size, q.device)
            work.workspaces[num_heads, head_size] = scratch
        if window not in work.items:
            work.items[window] = make_items(
                cache, page_table, slots, lengths, scratch.num_sms, window=window, rows=work.singles
            )
        launch(
            q, out, cache, layer, page_table, work.items[window], False, (None, None), (None, None, 0.0, 0.0),
            (scale, logit_cap, sinks), kv_scales, scratch, False,
        )  # fmt: skip
    return out
