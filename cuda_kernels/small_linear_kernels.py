"""Triton kernels of small_linear.py: products of few rows with [out, in] weights, bound by the weights' bytes.

`vector_kernel` takes one row: persistent programs, the row in registers, whole weight rows streamed through shared
memory. `tile_kernel` takes more: the weight tile is the M side of the tensor-core product, the tokens the N side; with
several splits of the inner axis the last program of a tile merges the partial sums in split order, so results do not
depend on who came last. Both can norm the row on the way in, and gate or add a residual on the way out.
DEPENDENT: launched while the kernel before still runs (sm_90); nothing but weights is touched before `arrive`.
Letters: T rows · I in · O out · F = O / 2 of a gated product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

ACTIVATIONS = {"": 0, "silu": 1, "gelu_tanh": 2, "gelu": 3}
LINE = tl.constexpr(128)  # bytes of a cache line


@triton.jit
def activate(x, KIND: tl.constexpr):
    if KIND == 1:
        return x * tl.sigmoid(x)
    if KIND == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2 * inner)  # 0.5 * (1 + tanh(y)) = sigmoid(2 y)
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def arrive(DEPENDENT: tl.constexpr):
    """Wait for the results of the kernel before, then let the next kernel's programs in.

    In this order: what a program may read has then been written by kernels that have ended, not by the last one alone.
    """
    if DEPENDENT:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def request(pointers, up, GATED: tl.constexpr):
    """Ask the L2 cache for the lines at these addresses, and for those of the second half, `up` elements on."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
    if GATED:
        tl.inline_asm_elementwise(asm, "=r,l", [(pointers + up).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def leave(place, sums, gates, square, GATED: tl.constexpr, NORM: tl.constexpr):
    """Store a program's partial sums. sums, gates: [BO, BT]; square: [BT]."""
    BO: tl.constexpr = sums.shape[0]
    BT: tl.constexpr = sums.shape[1]
    cells = tl.arange(0, BO)[:, None] * BT + tl.arange(0, BT)[None, :]
    tl.store(place + cells, sums)
    if GATED:
        tl.store(place + BO * BT + cells, gates)
    if NORM:
        tl.store(place + (1 + GATED) * BO * BT + tl.arange(0, BT), square)


@triton.jit
def gather(
    place,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BO: tl.constexpr,
    BT: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
):
    """The sums of all splits' partial sums, in split order. -> as `leave` takes them."""
    cells = tl.arange(0, BO)[:, None] * BT + tl.arange(0, BT)[None, :]
    sums = tl.zeros((BO, BT), tl.float32)
    gates = tl.zeros((BO, BT), tl.float32)
    square = tl.zeros((BT,), tl.float32)
    for split in tl.static_range(SPLITS):
        # past the first cache, which may hold what was here before
        sums += tl.load(place + split * SIZE + cells, cache_modifier=".cg")
        if GATED:
            gates += tl.load(place + split * SIZE + BO * BT + cells, cache_modifier=".cg")
        if NORM:
            tail = (1 + GATED) * BO * BT + tl.arange(0, BT)
            square += tl.load(place + split * SIZE + tail, cache_modifier=".cg")
    return sums, gates, square


@triton.jit
def vector_kernel(
    x,  # [I]
    norm_weight,  # f32 [I]
    weight,  # [O, I]
    bias,  # [O]
    residual,  # [O]
    out,  # [O], or [F] if gated
    num_out,  # rows of out
    eps,
    offset,
    INNER: tl.constexpr,
    BLOCK_IN: tl.constexpr,  # power of two >= INNER
    BLOCK_OUT: tl.constexpr,
    TRIPS: tl.constexpr,  # tiles of a program
    STAGES: tl.constexpr,
    REQUEST: tl.constexpr,  # tiles asked for before the wait, besides those of the stages
    NORM: tl.constexpr,
    KIND: tl.constexpr,  # of activation; 0: not gated
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    first, step = tl.program_id(0), tl.num_programs(0)
    inner = tl.arange(0, BLOCK_IN)
    rows = tl.arange(0, BLOCK_OUT)
    inside = inner < INNER
    up = num_out.to(tl.int64) * INNER
    if DEPENDENT:
        PER_LINE: tl.constexpr = LINE // (weight.dtype.element_ty.primitive_bitwidth // 8)
        starts = tl.minimum(tl.arange(0, BLOCK_IN // PER_LINE) * PER_LINE, INNER - 1)
        for ahead in tl.static_range(REQUEST):  # behind the tiles that the loop below loads before its first turn
            asked = tl.minimum((first + (STAGES - 1 + ahead) * step) * BLOCK_OUT + rows, num_out - 1)
            request(weight + asked[:, None].to(tl.int64) * INNER + starts[None, :], up, KIND > 0)
    row = tl.zeros((BLOCK_IN,), tl.float32)
    gain = row
    if NORM:
        gain = tl.load(norm_weight + inner, mask=inside, other=0.0).to(tl.float32) + offset
    for trip in tl.range(0, TRIPS, num_stages=STAGES):
        at = (first + trip * step) * BLOCK_OUT + rows
        clamped = tl.minimum(at, num_out - 1)
        places = weight + clamped[:, None].to(tl.int64) * INNER + inner[None, :]
        wanted = (at < num_out)[:, None] & inside[None, :]
        w = tl.load(places, mask=wanted, other=0.0, eviction_policy="evict_first")
        if trip == 0:  # behind the loads of the first tiles, which are in flight while this waits
            arrive(DEPENDENT)
            row = tl.load(x + inner, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                scale = tl.rsqrt(tl.sum(row * row, 0) / INNER + eps)
                row = (row * scale * gain).to(x.dtype.element_ty).to(tl.float32)
        added = tl.zeros((BLOCK_OUT,), tl.float32)  # loaded here, used below: its latency is that of the weights
        if BIAS:
            added += tl.load(bias + clamped).to(tl.float32)
        if RESIDUAL:
            added += tl.load(residual + clamped).to(tl.float32)
        y = tl.sum(w.to(tl.float32) * row[None, :], 1) + added
        if KIND > 0:
            v = tl.load(places + up, mask=wanted, other=0.0, eviction_policy="evict_first")
            z = tl.sum(v.to(tl.float32) * row[None, :], 1)
            if BIAS:
                z += tl.load(bias + num_out + clamped).to(tl.float32)
            y = activate(y, KIND) * z
        tl.store(out + at, y.to(out.dtype.element_ty), mask=at < num_out)


@triton.jit(do_not_specialize=["num_rows"])
def tile_kernel(
    x,  # [T, I]
    norm_weight,  # f32 [I]
    weight,  # [O, I]
    bias,  # [O]
    residual,  # [T, O]
    out,  # [T, O], or [T, F] if gated
    partials,  # f32, a (tile, split) has its sums and, if normed, its squares
    counters,  # i32 [tiles], zeros before and after
    num_rows,
    num_out,
    eps,
    offset,
    INNER: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    REQUEST: tl.constexpr,  # blocks of the inner axis asked for before the wait
    NORM: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    first_row = tl.program_id(2) * BLOCK_ROWS
    BLOCKS: tl.constexpr = (INNER + BLOCK_IN - 1) // BLOCK_IN
    SHARE: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS * BLOCK_IN
    EVEN: tl.constexpr = INNER % (BLOCK_IN * SPLITS) == 0
    GATED: tl.constexpr = KIND > 0
    SIZE: tl.constexpr = BLOCK_ROWS * ((1 + GATED) * BLOCK_OUT + 1)  # of a program's partial sums
    at = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    clamped = tl.minimum(at, num_out - 1)
    up = num_out.to(tl.int64) * INNER
    begin = split * SHARE
    weights = weight + clamped[:, None].to(tl.int64) * INNER
    if DEPENDENT and REQUEST > 0:
        PER_LINE: tl.constexpr = LINE // (weight.dtype.element_ty.primitive_bitwidth // 8)
        starts = begin + tl.arange(0, REQUEST * BLOCK_IN // PER_LINE) * PER_LINE
        request(weights + tl.minimum(starts, INNER - 1)[None, :], up, GATED)
    arrive(DEPENDENT)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    inputs = x + tl.minimum(row, num_rows - 1)[:, None].to(tl.int64) * INNER
    sums = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    gates = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)  # the second half's sums of a gated product
    squares = tl.zeros((BLOCK_ROWS, BLOCK_IN), tl.float32)
    for k in tl.range(0, SHARE, BLOCK_IN, num_stages=STAGES):
        inner = begin + k + tl.arange(0, BLOCK_IN)
        places = weights + inner[None, :]
        if EVEN:
            w = tl.load(places, eviction_policy="evict_first")
            a = tl.load(inputs + inner[None, :])
        else:
            inside = inner < INNER
            w = tl.load(places, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            a = tl.load(inputs + inner[None, :], mask=inside[None, :], other=0.0)
        if NORM:
            wide = a.to(tl.float32)
            squares += wide * wide
            gain = tl.load(norm_weight + tl.minimum(inner, INNER - 1)).to(tl.float32) + offset
            a = (wide * gain[None, :]).to(a.dtype)
        sums = tl.dot(w, tl.trans(a), sums, input_precision="ieee")
        if GATED:
            if EVEN:
                v = tl.load(places + up, eviction_policy="evict_first")
            else:
                v = tl.load(
                    weights + up + inner[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first"
                )
            gates = tl.dot(v, tl.trans(a), gates, input_precision="ieee")
    square = tl.sum(squares, 1)
    if SPLITS > 1:
        group = tl.program_id(2) * tl.num_programs(0) + tile
        leave(partials + (group * SPLITS + split) * SIZE, sums, gates, square, GATED, NORM)
        tl.debug_barrier()  # all threads' stores come before the release below
        if tl.atomic_add(counters + group, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(counters + group, 0)
        sums, gates, square = gather(partials + group * SPLITS * SIZE, SIZE, SPLITS, BLOCK_OUT, BLOCK_ROWS, GATED, NORM)
    if NORM:
        scale = tl.rsqrt(square / INNER + eps)
        sums *= scale[None, :]
        gates *= scale[None, :]
    if BIAS:
        sums += tl.load(bias + clamped).to(tl.float32)[:, None]
    if GATED:
        if BIAS:
            gates += tl.load(bias + num_out + clamped).to(tl.float32)[:, None]
        sums = activate(sums, KIND) * gates
    targets = row[None, :].to(tl.int64) * num_out + at[:, None]
    mask = (row[None, :] < num_rows) & (at[:, None] < num_out)
    if RESIDUAL:
        sums += tl.load(residual + targets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + targets, sums.to(out.dtype.element_ty), mask=mask)
