"""Triton kernels for weights in few bits: the inputs of a product made ready, the product, a weight turned back.

`prepare_kernel` norms or gates a row, and rounds it or lays it out; `product_kernel` streams a weight as it is kept and
multiplies tiles on tensor cores, its weights the M side, few tokens the N side, with the inner axis split among
programs where there are few tiles (merged by the last one, in split order, as in small_linear_kernels.py);
`dequantise_kernel` writes nibbles as numbers for cuBLAS.
DEPENDENT: launched while the kernel before still runs (sm_90).
Letters: T rows · I in · O out · G groups of inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cuda_kernels.small_linear_kernels import activate, arrive, gather, leave

BLOCK = tl.constexpr(128)  # of quant_weight.py
NONE, TOKEN, FIXED, BLOCKS = 0, 1, 2, 3  # how inputs are rounded
SMALLEST = tl.constexpr(1e-12)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: a float32 added to it has no digits behind the point


@triton.jit
def encoded(values, scale, FP8: tl.constexpr):
    """values / scale in the limits of the format, f32."""
    codes = tl.div_rn(values, scale)
    if FP8:
        return tl.minimum(tl.maximum(codes, -448.0), 448.0)
    return tl.minimum(tl.maximum((codes + ROUND) - ROUND, -128.0), 127.0)


@triton.jit
def prepare_kernel(
    x,  # [T, I], gated [T, 2 I]
    norm_weight,  # f32 [I]
    order,  # i32 [I]
    fixed,  # f32 [1]
    out,  # [T, I] of x's type, int8 or e4m3
    scales,  # f32 [T], or [T, I / 128]
    eps,
    offset,
    INNER: tl.constexpr,
    BLOCK_IN: tl.constexpr,  # power of two >= INNER
    NORM: tl.constexpr,
    KIND: tl.constexpr,  # of activation; 0: not gated
    MODE: tl.constexpr,  # NONE, TOKEN, FIXED, BLOCKS
    FP8: tl.constexpr,
    ORDER: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A row a program."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_IN)
    inside = place < INNER
    at = place
    if ORDER:
        at = tl.load(order + place, mask=inside, other=0)
    gain = tl.zeros((BLOCK_IN,), tl.float32)
    if NORM:
        gain = tl.load(norm_weight + at, mask=inside, other=0.0).to(tl.float32) + offset
    arrive(DEPENDENT)
    start = x + row * (INNER * (1 + (KIND > 0)))
    values = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
    if KIND > 0:
        up = tl.load(start + INNER + at, mask=inside, other=0.0).to(tl.float32)
        values = (activate(values, KIND) * up).to(x.dtype.element_ty).to(tl.float32)
    if NORM:
        values = values * tl.rsqrt(tl.sum(values * values, 0) / INNER + eps) * gain
        values = values.to(x.dtype.element_ty).to(tl.float32)
    LIMIT: tl.constexpr = 448.0 if FP8 else 127.0
    codes = values
    # what is not finite must not become a number: its scale is NaN, and so is what the product makes of it
    # (asked by size: values - values is no 0 where a compiler makes one instruction of the product in front and the -)
    if MODE == 1 or MODE == 2:
        bad = 1 - tl.min((tl.abs(values) < float("inf")).to(tl.int32), 0)
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), 0), SMALLEST), LIMIT)
        if MODE == 2:
            scale = tl.load(fixed)
        scale = tl.where(bad > 0, float("nan"), scale)
        tl.store(scales + row, scale)
        codes = encoded(values, scale, FP8)
    elif MODE == 3:
        grouped = tl.reshape(values, (BLOCK_IN // BLOCK, BLOCK))
        bad = 1 - tl.min((tl.abs(grouped) < float("inf")).to(tl.int32), 1)
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(grouped), 1), SMALLEST), LIMIT)
        scale = tl.where(bad > 0, float("nan"), scale)
        group = tl.arange(0, BLOCK_IN // BLOCK)
        blocks = (INNER + BLOCK - 1) // BLOCK
        tl.store(scales + row * blocks + group, scale, mask=group < blocks)
        codes = tl.reshape(encoded(grouped, scale[:, None], FP8), (BLOCK_IN,))
    tl.store(out + row * INNER + place, codes.to(out.dtype.element_ty), mask=inside)


@triton.jit
def digit(packed, nth: tl.constexpr, dtype: tl.constexpr):
    """A nibble as the last bits of 128 (bf16) or 1024 (fp16), or as it is (f32)."""
    code = (packed >> (4 * nth)) & 0xF
    if dtype == tl.bfloat16:
        value = (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        value = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        value = code.to(tl.float32)
    return value


@triton.jit
def digits(packed, dtype: tl.constexpr):
    """[A, 8 B] of i32 [A, B], the lowest nibble first, each as `digit` gives it."""
    evens = tl.join(
        tl.join(digit(packed, 0, dtype), digit(packed, 4, dtype)),
        tl.join(digit(packed, 2, dtype), digit(packed, 6, dtype)),
    )
    odds = tl.join(
        tl.join(digit(packed, 1, dtype), digit(packed, 5, dtype)),
        tl.join(digit(packed, 3, dtype), digit(packed, 7, dtype)),
    )
    return tl.reshape(tl.join(evens, odds), (packed.shape[0], packed.shape[1] * 8))


@triton.jit
def zero_of(zeros, dtype: tl.constexpr):
    """What to take from a digit, of any shape. zeros: int8."""
    added: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024 if dtype == tl.float16 else 0
    return (zeros.to(tl.float32) + added).to(dtype)


@triton.jit
def nibble_step(sums, w, a, scale, zeros, clamped, first, INNER: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr):
    """sums + (digits of w - zeros) * scale @ a.T. w: i32 [BO, B]; a: [BT, 8 B]; first: the group of w[:, 0]."""
    BLOCK_OUT: tl.constexpr = w.shape[0]
    COLUMNS: tl.constexpr = a.shape[1]
    row = clamped * (INNER // GROUP)
    if GROUP >= COLUMNS:  # all of one group: scaled behind the product
        v = digits(w, KIND) - zero_of(tl.load(zeros + row + first), KIND)[:, None]
        gain = tl.load(scale + row + first).to(tl.float32)
        sums += tl.dot(v, tl.trans(a), input_precision="ieee") * gain[:, None]
    else:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        place = row[:, None] + tl.minimum(first + tl.arange(0, GROUPS), INNER // GROUP - 1)[None, :]
        v = tl.reshape(digits(w, KIND), (BLOCK_OUT, GROUPS, GROUP))
        v = (v - zero_of(tl.load(zeros + place), KIND)[:, :, None]) * tl.load(scale + place).to(KIND)[:, :, None]
        sums = tl.dot(tl.reshape(v, (BLOCK_OUT, COLUMNS)), tl.trans(a), sums, input_precision="ieee")
    return sums


@triton.jit
def byte_step(sums, w, a, KIND: tl.constexpr, INTEGER: tl.constexpr, NATIVE: tl.constexpr):
    """sums + w @ a.T of 8-bit numbers. w: [BO, B]; a: [BT, B]; sums: i32 for INTEGER, else f32."""
    if INTEGER:
        sums = tl.dot(w, tl.trans(a), sums, out_dtype=tl.int32)
    elif NATIVE:
        sums = tl.dot(w, tl.trans(a), sums, max_num_imprecise_acc=128)
    elif w.dtype == tl.int8:
        sums = tl.dot(w.to(tl.float32).to(KIND), tl.trans(a.to(KIND)), sums, input_precision="ieee")
    else:
        sums = tl.dot(w.to(KIND), tl.trans(a.to(KIND)), sums, input_precision="ieee")
    return sums


@triton.jit
def square_step(
    w, a, scale, x_scales, clamped, row_at, nth, BLOCKS: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """w @ a.T * scale of block `nth`. w: e4m3 [BO, 128]; a: [BT, 128]; clamped: [BO]; row_at: [BT]."""
    if NATIVE:
        part = tl.dot(w, tl.trans(a), max_num_imprecise_acc=128)
    else:
        part = tl.dot(w.to(KIND), tl.trans(a.to(KIND)), input_precision="ieee")
    part *= tl.load(scale + clamped // BLOCK * BLOCKS + nth)[:, None]
    if SCALED:
        part *= tl.load(x_scales + row_at * BLOCKS + nth)[None, :]
    return part


@triton.jit
def part_of(rows, columns, WIDTH: tl.constexpr, EVEN: tl.constexpr, POLICY: tl.constexpr):
    """[R, B], columns [B] of the rows that begin at `rows`, [R, 1]; 0 behind WIDTH."""
    if EVEN:
        part = tl.load(rows + columns[None, :], eviction_policy=POLICY)
    else:
        part = tl.load(rows + columns[None, :], mask=(columns < WIDTH)[None, :], other=0.0, eviction_policy=POLICY)
    return part


@triton.jit
def scaled(sums, scale, x_scales, clamped, row_at, BY_OUTPUT: tl.constexpr, BY_ROW: tl.constexpr):
    """sums times what all of an output or of a row share. sums: [BO, BT]; clamped: [BO]; row_at: [BT]."""
    if BY_OUTPUT:
        sums *= tl.load(scale + clamped)[:, None]
    if BY_ROW:
        sums *= tl.load(x_scales + row_at)[None, :]
    return sums


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(
    x,  # [T, I] as prepare_kernel wrote it
    x_scales,  # f32 [T] or [T, I / 128]
    data,  # [O, I] e4m3 or int8, i32 [O, I / 8]
    scale,  # f32 [O] or [O / 128, I / 128]; with nibbles [O, G]
    zeros,  # int8 [O, G]
    bias,  # [O]
    residual,  # [T, O]
    out,  # [T, O]
    partials,  # f32, a (tile, split) has its sums
    counters,  # i32 [tiles], zeros before and after
    num_rows,
    num_out,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,  # of nibbles; 0: 8 bits
    MODE: tl.constexpr,  # how x is rounded
    SQUARES: tl.constexpr,  # scales of 128 x 128 blocks
    BLOCK_IN: tl.constexpr,  # with nibbles: int32
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    NATIVE: tl.constexpr,  # e4m3 by e4m3 as it is (sm_90), promoted to f32 every 128 inputs; else in fp16
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    first_row = tl.program_id(2) * BLOCK_ROWS
    PACK: tl.constexpr = 1 + 7 * (GROUP > 0)
    WIDTH: tl.constexpr = INNER // PACK
    WHOLE: tl.constexpr = (WIDTH + BLOCK_IN - 1) // BLOCK_IN
    SHARE: tl.constexpr = (WHOLE + SPLITS - 1) // SPLITS * BLOCK_IN
    EVEN: tl.constexpr = WIDTH % (BLOCK_IN * SPLITS) == 0
    INTEGER: tl.constexpr = MODE > 0 and data.dtype.element_ty == tl.int8
    SIZE: tl.constexpr = BLOCK_ROWS * (BLOCK_OUT + 1)
    KIND: tl.constexpr = x.dtype.element_ty if MODE == 0 else tl.float16  # of the product: e4m3 fits in fp16
    at = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    clamped = tl.minimum(at, num_out - 1)
    begin = split * SHARE
    weights = data + clamped[:, None].to(tl.int64) * WIDTH
    arrive(DEPENDENT)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    row_at = tl.minimum(row, num_rows - 1)
    inputs = x + row_at[:, None].to(tl.int64) * INNER
    sums = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.int32 if INTEGER else tl.float32)
    for k in tl.range(0, SHARE, BLOCK_IN, num_stages=STAGES):
        inner = begin + k + tl.arange(0, BLOCK_IN)
        w = part_of(weights, inner, WIDTH, EVEN, "evict_first")
        columns = (begin + k) * PACK + tl.arange(0, BLOCK_IN * PACK)
        a = part_of(inputs, columns, INNER, EVEN, "")
        if GROUP > 0:
            first = tl.minimum((begin + k) * 8, INNER - 1) // GROUP
            sums = nibble_step(sums, w, a, scale, zeros, clamped, first, INNER, GROUP, KIND)
        elif SQUARES:  # BLOCK_IN is BLOCK
            BLOCKS: tl.constexpr = (INNER + BLOCK - 1) // BLOCK
            nth = tl.minimum((begin + k) // BLOCK, BLOCKS - 1)
            sums += square_step(w, a, scale, x_scales, clamped, row_at, nth, BLOCKS, KIND, MODE > 0, NATIVE)
        else:
            sums = byte_step(sums, w, a, KIND, INTEGER, NATIVE)
    sums = sums.to(tl.float32)
    if SPLITS > 1:
        square = tl.zeros((BLOCK_ROWS,), tl.float32)
        tiles = tl.program_id(2) * tl.num_programs(0) + tile
        leave(partials + (tiles * SPLITS + split) * SIZE, sums, sums, square, False, False)
        tl.debug_barrier()  # all threads' stores come before the release below
        if tl.atomic_add(counters + tiles, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(counters + tiles, 0)
        sums, _, _ = gather(partials + tiles * SPLITS * SIZE, SIZE, SPLITS, BLOCK_OUT, BLOCK_ROWS, False, False)
    sums = scaled(sums, scale, x_scales, clamped, row_at, GROUP == 0 and not SQUARES, MODE == 1 or MODE == 2)
    if BIAS:
        sums += tl.load(bias + clamped).to(tl.float32)[:, None]
    targets = row[None, :].to(tl.int64) * num_out + at[:, None]
    mask = (row[None, :] < num_rows) & (at[:, None] < num_out)
    if RESIDUAL:
        sums += tl.load(residual + targets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + targets, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dequantise_kernel(
    data,  # i32 [O, I / 8]
    scale,  # [O, G]
    zeros,  # int8 [O, G]
    out,  # [O, I] of scale's type
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_IN: tl.constexpr,  # int32
):
    """Some of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = INNER // 8
    KIND: tl.constexpr = out.dtype.element_ty
    inner = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    packed = tl.load(data + row * WIDTH + inner, mask=inner < WIDTH, other=0)
    inputs = tl.program_id(1) * BLOCK_IN * 8 + tl.arange(0, BLOCK_IN * 8)
    place = row * (INNER // GROUP) + tl.minimum(inputs, INNER - 1) // GROUP
    values = tl.reshape(digits(packed[None, :], KIND), (BLOCK_IN * 8,)) - zero_of(tl.load(zeros + place), KIND)
    values = values * tl.load(scale + place).to(KIND)
    tl.store(out + row * INNER + inputs, values.to(KIND), mask=inputs < INNER)
