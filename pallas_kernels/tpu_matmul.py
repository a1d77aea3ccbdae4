"""Matrix products against [out, in] weights on a TPU: bf16, int8 and fp8 (w8a8), 4-bit weights (w4a16).

One kernel: a grid of blocks (rows, columns, inner), sums held in VMEM in float32 (int32 for int8) over the inner axis,
which is the fastest. Inside a block the columns go by in chunks, so that the code stays small. The weight stays
[N, K]: the product contracts the last axes of both, and the matrix unit takes the transposed weight as it is (98.5 k
static cycles against 97.8 k for [K, N], 1024 x 4096 x 4096 on v6e). Nothing in the engine calls this yet.

Edges: M and N may be ragged: rows and columns behind the end are read as what is there and never written. K is a
multiple of 128 and of the block's K; with 4 bits N is a multiple of 64. Written without ref.reshape and ref.bitcast,
so that it runs in Pallas's interpreter with its race detector.

4 bits: the int32 at [r, k] of i32 [N / 8, K] holds eight rows of column k: with r = 8a + b, nibble s of its half h is
row 64a + 16s + 2b + h, plus 8. Shift, mask and `or` with the bits of 128 make two bf16 numbers 128 + code at once, and
a bitcast gives 16 rows in their places: one and a half vector operations a weight. Scales are of groups of 128 inputs,
one lane register wide. They go on the weights ("weights": two bf16 operations, for chips whose vector unit has bf16)
or on the sums of each group ("sums": less 136 times the sum of the group's inputs, which is exact enough in float32).
Letters: M rows · N out · K in · G = K / 128 groups.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a vector register, and inputs of a group of 4-bit weights
TILE = 64  # rows of a tile of 4-bit weights: 8 words x 8 nibbles
INT8_MAX, E4M3_MAX = 127.0, 448.0
SMALLEST = 1e-12  # a scale of a row of zeros: anything but 0
MAGIC = 0x43004300  # two bf16 128s; the low 4 bits of each count ones
OFFSET = 136.0  # 128 of MAGIC, 8 of the code
SPARE_BYTES = 12 << 20  # of VMEM for values, spills and scales
CONTRACT_LAST = (((1,), (1,)), ((), ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What one step of the grid takes: rows, inner, columns; and columns of one pass of the loop inside.

    scaling: where 4-bit weights meet their scales; the other products do not look at it.
    """

    m: int
    k: int
    n: int
    chunk: int
    scaling: Literal["weights", "sums"] = "sums"


def matmul(
    x: Array, w: Array, *, block: Block, interpret: pltpu.InterpretParams | bool = False, name: str = "matmul"
) -> Array:
    """x @ w.T, of x's dtype. x: [M, K] bf16; w: [N, K] bf16. Raises ValueError for shapes that do not fit."""
    return product(x, w, (), "plain", block, x.dtype, interpret, name)


def matmul_w8a8(
    x: Array,
    w: Array,
    scale: Array,
    *,
    block: Block,
    wide: bool = False,
    interpret: pltpu.InterpretParams | bool = False,
    name: str = "matmul_w8a8",
) -> Array:
    """(rounded x) @ w.T, of x's dtype. x: [M, K] bf16, rounded a row; w: [N, K] int8 or e4m3; scale: f32 [N].

    wide: for chips whose matrix unit has no fp8 product (all before tpu7x) the rounded x is bf16; e4m3 beside it is
    taken as it is, the unit turns it to bf16 where it is latched.
    """
    codes, rows = round_rows(x, w.dtype)
    codes = codes.astype(jnp.bfloat16) if wide else codes
    return product(codes, w, (rows, scale[None, :]), "scaled", block, x.dtype, interpret, name)


def matmul_w4a16(
    x: Array,
    words: Array,
    scale: Array,
    *,
    block: Block,
    interpret: pltpu.InterpretParams | bool = False,
    name: str = "matmul_w4a16",
) -> Array:
    """x @ (code * scale).T, of x's dtype. x: [M, K] bf16; words: i32 [N / 8, K] of `pack`; scale: [N, G]."""
    scale = scale.astype(jnp.bfloat16) if block.scaling == "weights" else scale.astype(jnp.float32).T
    return product(x, words, (scale,), block.scaling, block, x.dtype, interpret, name)


def product(
    x: Array,
    w: Array,
    scales: tuple[Array, ...],
    kind: str,
    block: Block,
    dtype: np.dtype,
    interpret: pltpu.InterpretParams | bool,
    name: str,
) -> Array:
    (rows, inner), folded = x.shape, 8 if w.dtype == jnp.int32 else 1
    columns = w.shape[0] * folded
    if w.shape[1] != inner or inner % block.k or block.k % LANES or block.n % block.chunk or columns % (8 * folded):
        raise ValueError(f"x {x.shape}, w {w.shape} {w.dtype}: K must be a multiple of {block.k}, the K of {block}")
    if kind in ("weights", "sums") and block.n % (LANES if kind == "sums" else TILE):
        raise ValueError(f"{block}: 4-bit weights come in {TILE} rows, their scales by {LANES}")
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    steps = inner // block.k
    of_scales = {
        "plain": [],
        "scaled": [((block.m, 1), lambda i, j, k: (i, 0)), ((1, block.n), lambda i, j, k: (0, j))],
        "weights": [((block.n, inner // LANES), lambda i, j, k: (j, 0))],
        "sums": [((block.k // LANES, block.n), lambda i, j, k: (k, j))],
    }[kind]
    return pl.pallas_call(
        functools.partial(kernel, kind=kind, chunk=block.chunk, steps=steps),
        grid=(pl.cdiv(rows, block.m), pl.cdiv(columns, block.n), steps),
        in_specs=[
            pl.BlockSpec((block.m, block.k), lambda i, j, k: (i, k)),
            pl.BlockSpec((block.n // folded, block.k), lambda i, j, k: (j, k)),
            *(pl.BlockSpec(shape, place) for shape, place in of_scales),
        ],
        out_specs=pl.BlockSpec((block.m, block.n), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        scratch_shapes=[pltpu.VMEM((block.m, block.n) if steps > 1 else (8, LANES), sums)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(block, x.dtype, w.dtype) + SPARE_BYTES,
        ),
        interpret=interpret,
        name=name,
    )(x, w, *scales)


def vmem_bytes(block: Block, x: np.dtype, w: np.dtype) -> int:
    """Of a block: two buffers of inputs and output, and the sums; scales are left out."""
    a_weight = 0.5 if w == jnp.int32 else w.itemsize
    moved = x.itemsize * block.m * block.k + a_weight * block.n * block.k + 2 * block.m * block.n
    return int(2 * moved) + 4 * block.m * block.n


def kernel(x: Any, w: Any, *rest: Any, kind: Any, chunk: Any, steps: Any) -> None:
    """One block: x [m, k], w [n, k], the scales of `kind`, out [m, n], total [m, n] over the inner axis."""
    *scales, out, total = rest
    step = pl.program_id(2)

    def finish(sums: Any, columns: Any) -> None:
        if kind == "scaled":
            sums = sums.astype(jnp.float32) * scales[0][...] * scales[1][:, columns]
        out[:, columns] = sums.astype(out.dtype)

    def partial_sums(turn: Any, columns: Any) -> Any:
        words = pl.ds(pl.multiple_of(turn * (chunk // 8), chunk // 8), chunk // 8)
        if kind == "weights":
            return dot(x[...], scaled_weights(w[words, :], scales[0][columns, :], step), total.dtype)
        if kind == "sums":
            return scaled_sums(x, w[words, :], scales[0][:, columns])
        weight = w[columns, :]
        return dot(x[...], weight if is_mixed(x, weight) else weight.astype(x.dtype), total.dtype)

    def column_chunk(turn: Any, _: Any) -> Any:
        columns = pl.ds(pl.multiple_of(turn * chunk, chunk), chunk)
        if steps == 1:
            finish(partial_sums(turn, columns), columns)
            return 0

        # a body each: the first loads no sums, the last stores none
        @pl.when(step == 0)
        def _() -> None:
            total[:, columns] = partial_sums(turn, columns)

        if steps > 2:

            @pl.when((step > 0) & (step < steps - 1))
            def _() -> None:
                total[:, columns] += partial_sums(turn, columns)

        @pl.when(step == steps - 1)
        def _() -> None:
            finish(total[:, columns] + partial_sums(turn, columns), columns)

        return 0

    turns = out.shape[1] // chunk
    if turns == 1:
        column_chunk(0, 0)
    else:
        # two chunks side by side: one is unpacked while the other is multiplied
        lax.fori_loop(0, turns, column_chunk, 0, unroll=kind == "weights" and turns == 2)


def is_mixed(x: Any, weight: Any) -> bool:
    """Whether the matrix units take the two as they are: e4m3 weights beside bfloat16 rows, in every generation."""
    return x.dtype == jnp.bfloat16 and weight.dtype == jnp.float8_e4m3fn


def dot(x: Array, w: Array, sums: np.dtype) -> Array:
    return lax.dot_general(x, w, CONTRACT_LAST, preferred_element_type=sums)


def unpacked(words: Array) -> Array:
    """bf16 [8 r, k] of 128 + (code + 8). words: i32 [r, k], r a multiple of 8."""
    rows = []
    for tile in range(0, words.shape[0], 8):
        for shift in range(0, 16, 4):
            bits = lax.shift_right_logical(words[tile : tile + 8], jnp.int32(shift)) & 0x000F000F | MAGIC
            rows.append(pltpu.bitcast(bits, jnp.bfloat16))
    return jnp.concatenate(rows, axis=0)


def scaled_weights(words: Array, scale: Array, step: Array) -> Array:
    """bf16 [n, k]: codes times the scales of their groups. words: i32 [n / 8, k]; scale: bf16 [n, G] of all of K."""
    groups = words.shape[1] // LANES
    plain = unpacked(words) - jnp.bfloat16(OFFSET)
    lane = lax.broadcasted_iota(jnp.int32, scale.shape, 1)
    wide, scaled = scale.astype(jnp.float32), []
    for group in range(groups):
        if scale.shape[1] == groups:
            factor = scale[:, group : group + 1]
        else:  # this step's groups stand where it says
            own = jnp.where(lane == step * groups + group, wide, 0.0)
            factor = jnp.sum(own, axis=1, keepdims=True).astype(jnp.bfloat16)
        scaled.append(plain[:, group * LANES : (group + 1) * LANES] * factor)
    return jnp.concatenate(scaled, axis=1)


def scaled_sums(x: Any, words: Array, scale: Array) -> Array:
    """f32 [m, n]: the sums of each group, each times its scale. x: [m, k]; words: i32 [n / 8, k]; scale: f32 [g, n]."""
    total = jnp.zeros((x.shape[0], scale.shape[1]), jnp.float32)
    for group in range(scale.shape[0]):
        lanes = slice(group * LANES, (group + 1) * LANES)
        inputs = x[:, lanes]
        sums = dot(inputs, unpacked(words[:, lanes]), jnp.float32)
        less = OFFSET * jnp.sum(inputs.astype(jnp.float32), axis=1, keepdims=True)
        total += (sums - less) * scale[group : group + 1]
    return total


def round_rows(x: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """x rounded a row to int8 or e4m3: (codes [M, K], scales f32 [M, 1]); a row that is not finite has scale NaN."""
    limit = INT8_MAX if dtype == jnp.int8 else E4M3_MAX
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True).astype(jnp.float32)
    scale = jnp.where(jnp.isfinite(largest), jnp.maximum(largest, SMALLEST) / limit, jnp.nan)
    ratio = x.astype(jnp.float32) / scale
    if dtype == jnp.int8:
        ratio = jnp.round(jnp.where(jnp.isnan(ratio), 0.0, ratio))
    return jnp.clip(ratio, -limit, limit).astype(dtype), scale


def pack(codes: np.ndarray) -> np.ndarray:
    """i32 [N / 8, K] of int codes -8 .. 7 [N, K], N a multiple of 64; on the host, once, when weights are loaded."""
    tiles = (codes.astype(np.int64) + 8).reshape(-1, 4, 8, 2, codes.shape[1])  # [a, s, b, h, k]
    shifts = 4 * np.arange(4)[:, None, None] + 16 * np.arange(2)
    words = np.sum(tiles << shifts[None, ..., None], axis=(1, 3))
    return words.astype(np.uint32).view(np.int32).reshape(-1, codes.shape[1])


def matmul_reference(x: Array, w: Array) -> Array:
    return dot(x, w, jnp.float32).astype(x.dtype)


def matmul_w8a8_reference(x: Array, w: Array, scale: Array) -> Array:
    codes, rows = round_rows(x, w.dtype)
    wide = jnp.int32 if w.dtype == jnp.int8 else jnp.float32
    return (dot(codes.astype(wide), w.astype(wide), wide).astype(jnp.float32) * rows * scale).astype(x.dtype)


def matmul_w4a16_reference(x: Array, codes: Array, scale: Array) -> Array:
    """codes: int [N, K], -8 .. 7; scale: [N, G]."""
    weight = codes.astype(jnp.float32) * jnp.repeat(scale.astype(jnp.float32), LANES, axis=1)
    return dot(x.astype(jnp.float32), weight, jnp.float32).astype(x.dtype)
