"""Attention of rows with one new token each, in one Triton launch: norm, rope, cache write, split keys, merge.

Called by gpu_attention.py in a CUDA graph of a decode step, and by attention_ragged.py for the one-token rows of a
mixed step. A program has one KV head (query heads packed in one tile) of a work item: a row, or a split of its keys.
Every program finds its item from all lengths, so one captured grid serves any lengths; the last split of a row to
finish merges all, in their order, so results do not depend on who came last. They do depend on how many splits a row
has, thus on the other rows; a row's own key is attended to first here, and in its place among the keys in a mixed step,
which rounds differently.
Page table, slots and lengths may be read before the kernel in front has finished (DEPENDENT): it must not write them.
Letters: S rows · N query heads · K KV heads · G = N / K · H head size · R rotary size · P pages · C keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

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

PROGRAMS_OF_SM = 3  # that run at once
FEW_OF_SM = 2  # programs of a step of few rows: more keep the next product's programs out
MAX_WAVES = 2  # of any plan
BLOCKS_OF_ROWS = (16, 64, 256, 1024, 8192)  # few, since each is a kernel of its own


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
def find_work(
    lengths, slots, rows, item, num_rows, budget, fewest_tiles,
    NEW: tl.constexpr, WINDOW: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(row, length, slot, split, splits of the row, tiles of a split) of a work item; row = num_rows: none is left.

    Every program works it out from all lengths: splits are as long as `budget` of them need to be for all rows.
    """
    lanes = tl.arange(0, BLOCK_S)
    real = lanes < num_rows
    places = lanes
    if not NEW:
        places = tl.load(rows + 2 * lanes, mask=real, other=0)
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


@triton.jit
def is_beyond(rows, item, budget, NEW: tl.constexpr):
    """Whether an item is beyond all work, told fast: each row has a split, all together at most `budget` more."""
    beyond = False
    if not NEW:
        beyond = tl.load(rows + 2 * (item - budget), mask=item >= budget, other=0) < 0
    return beyond


@triton.jit
def token_of(rows, ticket, NEW: tl.constexpr):
    """The token of the step that a row has."""
    token = ticket
    if not NEW:
        token = tl.load(rows + 2 * ticket + 1)
    return token


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
    do_not_specialize=["table_stride", "num_rows", "budget", "fewest_tiles"],
    do_not_specialize_on_alignment=["page_table", "slots", "lengths", "rows"],
)
def decode_kernel(
    qkv,  # [S, (N + 2K) * H]; without NEW the finished queries [T, N, H]
    out,  # [S, N * H]; without NEW [T, N, H]
    k_pages,  # [P, K, page, H]
    v_pages,
    page_table,  # i32 [max_slots + 1, max_pages]
    slots,  # i32 [S]
    lengths,  # i32 [S]
    rows,  # i32 [num_rows, 2] row and token of the step, rows of -1 behind all others; without NEW only
    cos,
    sin,
    q_norm,
    k_norm,
    sinks,  # f32 [N]
    partials,  # f32 [work items, K, G * (H + 2)]
    counters,  # i32 [S * K]
    table_stride,
    num_rows,
    budget,  # splits that all rows together may have beyond one each
    fewest_tiles,  # of a split
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
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,  # keys of a tile
    BLOCK_Z: tl.constexpr,
    GROUP_2: tl.constexpr,  # power of two >= G
    BLOCK_S: tl.constexpr,  # power of two >= S
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
    if is_beyond(rows, item, budget, NEW):
        return
    ticket, length, slot, split, active, share = find_work(
        lengths, slots, rows, item, num_rows, budget, fewest_tiles, NEW, WINDOW, BLOCK_C, BLOCK_S
    )
    if ticket >= num_rows:
        return
    token = token_of(rows, ticket, NEW)
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


def plan_for(rows: int, kv_heads: int, row_bytes: int, work: Workspace) -> Plan:
    """row_bytes: of one key, padded to a power of two.

    Where splits can make all programs run at once, they are made for that; else there are so many that the last ones
    weigh little. Measured on an H200 for 8 KV heads of 128 values.
    """
    block = 64 if row_bytes <= 256 else 32
    if rows * kv_heads <= work.num_sms * PROGRAMS_OF_SM:
        return Plan(block=block, waves=1, of_sm=FEW_OF_SM, merged=16, requests=3, early=True)
    # two stages let five programs share a multiprocessor: wanted while one round of programs takes all rows
    at_once = rows * kv_heads <= work.num_sms * 5
    return Plan(block=block, waves=2, merged=4, stages=2 if at_once else 3)


def work_items(rows: int, kv_heads: int, max_keys: int, work: Workspace, plan: Plan) -> tuple[int, int, int]:
    """(items of the grid, budget, fewest tiles of a split), see find_work."""
    tiles = triton.cdiv(max_keys, plan.block)
    share = triton.cdiv(plan.split_keys, plan.block)
    budget = max(1, work.num_sms * plan.of_sm * plan.waves // kv_heads)
    return min(rows + budget, rows * triton.cdiv(tiles, share)), budget, share


def launch(
    qkv: Tensor,
    out: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    slots: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    turn: tuple[Tensor | None, Tensor | None],
    norms: tuple[Tensor | None, Tensor | None, float, float],
    limits: tuple[float, int | None, float | None, Tensor | None],
    kv_scales: tuple[float, float],
    workspace: Workspace,
    dependent: bool,
) -> None:
    """The kernel on a grid for its arguments; `rows` of a mixed step: i32 [programs, 2], see decode_kernel."""
    _, _, _, kv_heads, page, head_size = cache.shape
    num_heads = out.numel() // (out.shape[0] * head_size)
    group = num_heads // kv_heads
    count = slots.shape[0] if rows is None else rows.shape[0]
    (q_norm, k_norm, eps, offset), (scale, window, logit_cap, sinks) = norms, limits
    block_h, block_g = triton.next_power_of_2(head_size), max(16, triton.next_power_of_2(group))
    plan = plan_for(count, kv_heads, block_h * cache.element_size(), workspace)
    items, budget, share = work_items(count, kv_heads, page_table.shape[1] * page, workspace, plan)
    needed = items * num_heads * (head_size + 2)
    if needed > workspace.partials.numel() or count * kv_heads > workspace.counters.numel():
        raise ValueError(f"the workspace is too small for {count} rows of {num_heads} heads in {items} splits")
    factor, cap = score_factors(scale, logit_cap, kv_scales[0])
    group_2 = triton.next_power_of_2(group)
    block_s = next(size for size in BLOCKS_OF_ROWS if size >= count)
    linear = cache.is_cuda and head_size == block_h and page % plan.block == 0
    options = {"launch_pdl": True} if dependent else {}
    if plan.registers is not None:
        options["maxnreg"] = plan.registers
    decode_kernel[(kv_heads, items)](
        qkv, out, cache[layer, 0], cache[layer, 1], page_table, slots, lengths, rows, *turn, q_norm, k_norm, sinks,
        workspace.partials, workspace.counters, page_table.stride(0), count, budget, share,
        factor, cap, float(eps), float(offset), *kv_scales,
        NUM_HEADS=num_heads, NUM_KV_HEADS=kv_heads, HEAD=head_size, BLOCK_H=block_h, BLOCK_G=block_g,
        BLOCK_C=plan.block, BLOCK_Z=max(1, plan.merged * 512 // (group_2 * block_h)), GROUP_2=group_2,
        BLOCK_S=block_s, HALF=rotary_half(turn[0], count, head_size), PAGE=page, WINDOW=window or 0,
        NEW=rows is None,
        Q_NORM=q_norm is not None, K_NORM=k_norm is not None, CAP=logit_cap is not None, SINKS=sinks is not None,
        STAGES=plan.stages, FP16=fp16_products(qkv, cache), REQUESTS=plan.requests if linear else 0,
        EARLY=int(plan.early), DEPENDENT=dependent, num_warps=plan.warps, **options,
    )  # fmt: skip


def decode_attention(
    qkv: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    slots: Tensor,
    lengths: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    window: int | None = None,
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
    slots, lengths: i32 [S], padding rows have length 1; cos, sin: f32 [S, R / 2]; sinks: [N]; q_norm, k_norm: f32 [H];
    kv_scales: an e4m3 cache keeps x / scale; dependent: launch before the kernel in front is done (sm_90).
    """
    _, _, _, kv_heads, _, head_size = cache.shape
    width = (num_heads + 2 * kv_heads) * head_size
    if qkv.shape[1] != width or not qkv.is_contiguous() or slots.shape != lengths.shape != qkv.shape[:1]:
        raise ValueError(f"qkv must be [{slots.shape[0]}, {width}], contiguous, not {qkv.shape}")
    out = torch.empty(qkv.shape[0], num_heads * head_size, dtype=qkv.dtype, device=qkv.device)
    launch(
        qkv, out, cache, layer, page_table, slots, lengths, None, (cos, sin), (q_norm, k_norm, norm_eps, norm_offset),
        (scale, window, logit_cap, sinks), kv_scales, workspace, dependent,
    )  # fmt: skip
    return out
