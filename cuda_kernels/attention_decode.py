"""Attention of rows with one new token each, in one Triton launch: norm, rope, cache write, split keys, merge.

Called by gpu_attention.py in a CUDA graph of a decode step, and by attention_ragged.py for the one-token rows of a
mixed step. A program has one KV head (query heads packed in one tile) of a work item of attention_items.py: a row, or a
split of its keys. One captured grid serves any lengths; the last split of a row to finish merges all, in their order,
so results do not depend on who came last. They do depend on how many splits a row has, thus on the other rows; a row's
own key is attended to first here, and in its place among the keys in a mixed step, which rounds differently.
Page table and items may be read before the kernel in front has finished (DEPENDENT): it must not write them.
Letters: S rows · N query heads · K KV heads · G = N / K · H head size · R rotary size · P pages · C keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from cuda_kernels.attention_items import MAX_WAVES, PROGRAMS_OF_SM, RECORD, Items
from cuda_kernels.attention_tiles import (
    add_sinks,
    for_products,
    fp16_products,
    key_offsets,
    page_of,
    request_tiles,
    score_factors,
    scores_of,
    softcap,
)
from cuda_kernels.rope_cache import load_turned, rotary_half, storable


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Scratch of one stream's decode attention. Counters are 0 between launches."""

    partials: Tensor  # f32 [work items * N * (H + 2)]
    counters: Tensor  # i32 [max rows * N]
    num_sms: int


def make_workspace(max_rows: int, num_heads: int, head_size: int, device: torch.device) -> Workspace:
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    items = max_rows + sms * PROGRAMS_OF_SM * MAX_WAVES
    return Workspace(
        partials=torch.empty(items * num_heads * (head_size + 2), dtype=torch.float32, device=device),
        counters=torch.zeros(max_rows * num_heads, dtype=torch.int32, device=device),
        num_sms=sms,
    )


@triton.jit
def merge(
    out,  # [G * H] of this row and KV head
    partials,  # f32 [splits, STRIDE] of this row, from this KV head on: sums [G, H], largest scores [G], weights [G]
    sinks,  # [N]
    kv_head,
    active,
    v_scale,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    STRIDE: tl.constexpr,  # from one split's partials to the next
    SINKS: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    GROUP_2: tl.constexpr,  # power of two >= G
    BLOCK_H: tl.constexpr,
):
    """All splits of a row, BLOCK_Z at a time, in their order."""
    group = tl.arange(0, GROUP_2)
    dims = tl.arange(0, BLOCK_H)
    real = group < GROUP
    cells = group[:, None] * HEAD + dims[None, :]
    inside = real[:, None] & (dims < HEAD)[None, :]
    top = tl.full([GROUP_2], -1e30, tl.float32)
    weight = tl.zeros([GROUP_2], tl.float32)
    total = tl.zeros([GROUP_2, BLOCK_H], tl.float32)
    for first in range(0, active, BLOCK_Z):
        splits = first + tl.arange(0, BLOCK_Z)
        counted = splits < active
        pair = (splits * STRIDE + GROUP * HEAD)[:, None] + group[None, :]
        wanted = counted[:, None] & real[None, :]
        tops = tl.load(partials + pair, mask=wanted, other=-1e30, cache_modifier=".cg")
        weights = tl.load(partials + GROUP + pair, mask=wanted, other=0.0, cache_modifier=".cg")
        places = (splits * STRIDE)[:, None, None] + cells[None, :, :]
        sums = tl.load(
            partials + places, mask=counted[:, None, None] & inside[None, :, :], other=0.0, cache_modifier=".cg"
        )
        higher = tl.maximum(top, tl.max(tops, 0))
        share = tl.exp2(tops - higher[None, :])
        kept = tl.exp2(top - higher)
        weight = weight * kept + tl.sum(weights * share, 0)
        total = total * kept[:, None] + tl.sum(sums * share[:, :, None], 0)
        top = higher
    weight, total = add_sinks(sinks, kv_head * GROUP + tl.minimum(group, GROUP - 1), top, weight, total, SINKS)
    tl.store(out + cells, (total * (v_scale / weight)[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_tile(q, k, v, seen, top, weight, total, factor, cap, CAP: tl.constexpr):
    """A tile of keys and values more. q: [G, H]; k, v: [C, H]; seen: [C]; top, weight: [G]; total: [G, H]."""
    s = scores_of(q, tl.trans(k.to(q.dtype)), factor, cap, CAP)
    s = tl.where(seen[None, :], s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    kept = tl.exp2(top - higher)
    weight = weight * kept + tl.sum(p, 1)
    total = tl.dot(p.to(q.dtype), v.to(q.dtype), total * kept[:, None], input_precision="ieee")
    return higher, weight, total


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["page_table"],
)
def decode_kernel(
    qkv,  # [S, (N + 2K) * H]; without NEW the finished queries [T, N, H]
    out,  # [S, N * H]; without NEW [T, N, H]
    k_pages,  # [P, K, page, H]
    v_pages,
    page_table,  # i32 [max_slots + 1, max_pages]
    records,  # i32 [items, RECORD]
    cos,
    sin,
    q_norm,
    k_norm,
    sinks,  # f32 [N]
    partials,  # f32 [work items, K, G * (H + 2)]
    counters,  # i32 [S * K]
    table_stride,
    factor,  # of the scores, see softcap
    cap,
    eps,
    offset,
    k_scale,
    v_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,  # lanes of the queries, power of two >= G
    BLOCK_C: tl.constexpr,  # keys of a tile
    BLOCK_Z: tl.constexpr,
    GROUP_2: tl.constexpr,  # power of two >= G
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 = none
    NEW: tl.constexpr,  # norm, rope and cache write are done here, else they have been
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    STAGES: tl.constexpr,
    FP16: tl.constexpr,  # products in fp16: e4m3 becomes that in one instruction, bf16 in several
    REQUESTS: tl.constexpr,  # tiles asked of the L2 cache before the wait
    EARLY: tl.constexpr,  # the first tile is loaded before the wait
    DEPENDENT: tl.constexpr,
):
    ACT: tl.constexpr = qkv.dtype.element_ty
    STORED: tl.constexpr = k_pages.dtype.element_ty
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head, item = tl.program_id(0), tl.program_id(1)
    if DEPENDENT:
        cuda.gdc_launch_dependents()
    record = records + RECORD * item
    ticket, token, slot = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    length, split = tl.load(record + 3), tl.load(record + 4)
    active, share = tl.load(record + 5), tl.load(record + 6)
    table = page_table + slot.to(tl.int64) * table_stride
    end = length  # of the keys read from the pages
    if NEW:
        end = length - 1
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, length - WINDOW)
    first_tile = begin // BLOCK_C
    low = first_tile + split * share
    high = tl.minimum(low + share, tl.cdiv(end, BLOCK_C))
    ahead = page_of(table, low * BLOCK_C, end, PAGE, BLOCK_C)
    # behind all loads of the record and of the page, or the compiler makes most of them wait for the exit
    if (active == 0) | (ahead < 0):
        return
    keys = tl.arange(0, BLOCK_C)
    dims = tl.arange(0, BLOCK_H)
    inside = dims < HEAD
    k_first, v_first, seen_first = 0, 0, 0  # of type, where there are none
    if EARLY:  # earlier steps wrote it: it comes while this waits for the queries
        at = low * BLOCK_C
        seen_first = (at + keys < end) & (at + keys >= begin) & (low < high)
        places = key_offsets(table, ahead, keys, at, end, kv_head, NUM_KV_HEADS, PAGE, HEAD, BLOCK_C)
        wanted = seen_first[:, None] & inside[None, :]
        k_first = tl.load(k_pages + places[:, None] + dims[None, :], mask=wanted, other=0.0)
        v_first = tl.load(v_pages + places[:, None] + dims[None, :], mask=wanted, other=0.0)
        ahead = page_of(table, at + BLOCK_C, end, PAGE, BLOCK_C)
    request_tiles(
        k_pages, v_pages, table, low, end, kv_head, EARLY, REQUESTS, NUM_KV_HEADS, PAGE, HEAD, BLOCK_C
    )  # fmt: skip
    if DEPENDENT:
        cuda.gdc_wait()

    group = tl.arange(0, BLOCK_G)
    some = group[:, None] < GROUP
    top = tl.full([BLOCK_G], -1e30, tl.float32)
    weight = tl.zeros([BLOCK_G], tl.float32)
    total = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    if NEW:
        one = tl.arange(0, 1)[:, None]
        start = qkv + token.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD)
        heads = start + (kv_head * GROUP + group[:, None]) * HEAD
        turn = token * HALF
        q = load_turned(
            heads, turn + group[:, None] * 0, q_norm, cos, sin, some, eps, offset, HEAD, BLOCK_H, HALF, Q_NORM
        ).to(ACT)
        # This token's own key and value are never read back from the pages; the last split has them. All splits load
        # them, so that these loads are under way together with those of the queries.
        owner = split == active - 1
        own = start + (NUM_HEADS + kv_head) * HEAD + one
        new_k = load_turned(own, turn + one, k_norm, cos, sin, one == 0, eps, offset, HEAD, BLOCK_H, HALF, K_NORM)
        new_k = storable(new_k, 1.0 / k_scale, ACT, STORED)
        new_v = tl.load(own + NUM_KV_HEADS * HEAD + dims[None, :], mask=inside[None, :], other=0.0)
        new_v = storable(new_v.to(tl.float32), 1.0 / v_scale, ACT, STORED)
        last = tl.load(table + end // PAGE).to(tl.int64)
        place = ((last * NUM_KV_HEADS + kv_head) * PAGE + end % PAGE) * HEAD + dims[None, :]
        tl.store(k_pages + place, new_k, mask=inside[None, :] & owner)
        tl.store(v_pages + place, new_v, mask=inside[None, :] & owner)
        own_score = softcap(tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * factor, cap, CAP)
        top = tl.where(owner, own_score, top)
        weight += tl.where(owner, 1.0, 0.0)
        total += tl.where(owner, new_v.to(tl.float32), 0.0)
    else:
        heads = qkv + (token.to(tl.int64) * NUM_HEADS + kv_head * GROUP + group[:, None]) * HEAD
        q = tl.load(heads + dims[None, :], mask=some & inside[None, :], other=0.0)

    q = for_products(q, FP16)
    if EARLY:
        top, weight, total = add_tile(q, k_first, v_first, seen_first, top, weight, total, factor, cap, CAP)
    for tile in tl.range(low + EARLY, high, num_stages=STAGES):
        at = tile * BLOCK_C
        position = at + keys
        seen = position < end
        if WINDOW > 0:
            seen = seen & (position >= begin)
        page = ahead
        ahead = page_of(table, at + BLOCK_C, end, PAGE, BLOCK_C)
        places = key_offsets(table, page, keys, at, end, kv_head, NUM_KV_HEADS, PAGE, HEAD, BLOCK_C)
        k = tl.load(k_pages + places[:, None] + dims[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
        v = tl.load(v_pages + places[:, None] + dims[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
        top, weight, total = add_tile(q, k, v, seen, top, weight, total, factor, cap, CAP)

    out_at = out + (token.to(tl.int64) * NUM_HEADS + kv_head * GROUP) * HEAD
    if active == 1:
        weight, total = add_sinks(sinks, kv_head * GROUP + tl.minimum(group, GROUP - 1), top, weight, total, SINKS)
        result = (total * (v_scale / weight)[:, None]).to(ACT)
        tl.store(out_at + group[:, None] * HEAD + dims[None, :], result, mask=some & inside[None, :])
    else:
        STRIDE: tl.constexpr = NUM_HEADS * (HEAD + 2)
        mine = partials + item.to(tl.int64) * STRIDE + kv_head * (GROUP * (HEAD + 2))
        pair = ticket * NUM_KV_HEADS + kv_head
        tl.store(mine + group[:, None] * HEAD + dims[None, :], total, mask=some & inside[None, :])
        tl.store(mine + GROUP * HEAD + group, top, mask=group < GROUP)
        tl.store(mine + GROUP * (HEAD + 1) + group, weight, mask=group < GROUP)
        tl.debug_barrier()  # all threads have stored before one thread says so
        arrived = tl.atomic_add(counters + pair, 1, sem="acq_rel")
        if arrived == active - 1:
            tl.store(counters + pair, 0)
            merge(
                out_at, mine - split.to(tl.int64) * STRIDE, sinks, kv_head, active, v_scale,
                GROUP, HEAD, STRIDE, SINKS, BLOCK_Z, GROUP_2, BLOCK_H,
            )  # fmt: skip


def launch(
    qkv: Tensor,
    out: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    items: Items,
    new: bool,
    turn: tuple[Tensor | None, Tensor | None],
    norms: tuple[Tensor | None, Tensor | None, float, float],
    limits: tuple[float, float | None, Tensor | None],
    kv_scales: tuple[float, float],
    workspace: Workspace,
    dependent: bool,
) -> None:
    """The kernel on a grid for its arguments. new: norm, rope and cache write are done here."""
    _, _, _, kv_heads, page, head_size = cache.shape
    num_heads = out.numel() // (out.shape[0] * head_size)
    group = num_heads // kv_heads
    (q_norm, k_norm, eps, offset), (scale, logit_cap, sinks) = norms, limits
    block_h, group_2 = triton.next_power_of_2(head_size), triton.next_power_of_2(group)
    plan, count = items.plan, len(items.records)
    needed = count * num_heads * (head_size + 2)
    if needed > workspace.partials.numel() or items.rows * kv_heads > workspace.counters.numel():
        raise ValueError(f"the workspace is too small for {items.rows} rows of {num_heads} heads in {count} splits")
    factor, cap = score_factors(scale, logit_cap, kv_scales[0])
    linear = cache.is_cuda and head_size == block_h and page % plan.block == 0
    options = {"launch_pdl": True} if dependent else {}
    if plan.registers is not None:
        options["maxnreg"] = plan.registers
    decode_kernel[(kv_heads, count)](
        qkv, out, cache[layer, 0], cache[layer, 1], page_table, items.records, *turn, q_norm, k_norm, sinks,
        workspace.partials, workspace.counters, page_table.stride(0),
        factor, cap, float(eps), float(offset), *kv_scales,
        NUM_HEADS=num_heads, NUM_KV_HEADS=kv_heads, HEAD=head_size, BLOCK_H=block_h, BLOCK_G=max(plan.lanes, group_2),
        BLOCK_C=plan.block, BLOCK_Z=max(1, plan.merged * 512 // (group_2 * block_h)), GROUP_2=group_2,
        HALF=rotary_half(turn[0], items.rows, head_size), PAGE=page, WINDOW=items.window or 0, NEW=new,
        Q_NORM=q_norm is not None, K_NORM=k_norm is not None, CAP=logit_cap is not None, SINKS=sinks is not None,
        STAGES=plan.stages, FP16=fp16_products(qkv, cache), REQUESTS=plan.requests if linear else 0,
        EARLY=int(plan.early), DEPENDENT=dependent, num_warps=plan.warps, **options,
    )  # fmt: skip


def decode_attention(
    qkv: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    items: Items,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    logit_cap: float | None = None,
    sinks: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    workspace: Workspace,
    dependent: bool = False,
) -> Tensor:
    """Attention of rows with one new token -> [S, N * H]; its key and value go to the page of position length - 1.

    qkv: [S, (N + 2K) * H]; cache: [L, 2, P, K, page, H], changed in place; page_table: i32 [max_slots + 1, max_pages];
    items: of make_items, padding rows have length 1; cos, sin: f32 [S, R / 2]; sinks: [N]; q_norm, k_norm: f32 [H];
    kv_scales: an e4m3 cache keeps x / scale; dependent: launch before the kernel in front is done (sm_90).
    """
    _, _, _, kv_heads, _, head_size = cache.shape
    width = (num_heads + 2 * kv_heads) * head_size
    if tuple(qkv.shape) != (items.rows, width) or not qkv.is_contiguous():
        raise ValueError(f"qkv must be [{items.rows}, {width}], contiguous, not {qkv.shape}")
    out = torch.empty(qkv.shape[0], num_heads * head_size, dtype=qkv.dtype, device=qkv.device)
    launch(
        qkv, out, cache, layer, page_table, items, True, (cos, sin), (q_norm, k_norm, norm_eps, norm_offset),
        (scale, logit_cap, sinks), kv_scales, workspace, dependent,
    )  # fmt: skip
    return out
