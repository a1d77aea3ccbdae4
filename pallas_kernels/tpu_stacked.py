"""Products with 4-bit weights of a stack of layers on a TPU, each read where it lies.

As tpu_matmul's w4a16 with scales on the sums, but words and scales are those of all layers and the layer's index is
prefetched as a scalar, so that blocks come from the stack: no layer's weight is copied or widened in HBM. Groups may
have a zero of their own. Scales lie as [N / 128, G, 128]: parts of a fused weight are rows, and outputs in the lanes.
Letters: L layers · M rows · N out · K in · G = K / 128 groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_matmul import LANES, OFFSET, dot, pack, unpacked

ROWS, COLUMNS, WORDS = 512, 512, 8
"""Most rows and columns of a block; weights in a word."""
INNER = 4096  # most inputs of a block
ROW_TILE = 16  # rows of a register of bf16
SPARE_BYTES = 12 << 20


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class StackedNibbles:
    """The weight [N, K] of one layer, in the stack of all."""

    words: Array  # i32 [L, N / 8, K] of tpu_matmul.pack
    scale: Array  # f32 [L, N / 128, G, 128]
    zeros: Array | None  # like scale: what is taken off codes of -8 .. 7
    layer: Array  # i32 []

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[1] * WORDS, self.words.shape[2]


def packed(codes: np.ndarray, scale: np.ndarray, zeros: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """(words, scale, zeros if any) of a layer as the stack has them. codes: 0 .. 15 [N, K]; scale: [N, G]; zeros: of
    the codes, [N, G]. On the host, once.
    """
    tables = (scale,) if zeros is None else (scale, zeros.astype(np.float32) - 8)
    return pack(codes.astype(np.int8) - 8), *(np.ascontiguousarray(in_lanes(each)) for each in tables)


def in_lanes(table: np.ndarray) -> np.ndarray:
    """f32 [N / 128, G, 128] of [N, G]."""
    return table.astype(np.float32).reshape(-1, LANES, table.shape[1]).swapaxes(1, 2)


def matmul(
    x: Array, weight: StackedNibbles, *, dtype: jnp.dtype, interpret: pltpu.InterpretParams | bool = False
) -> Array:
    """x @ weight.T, [M, N] of dtype. x: [M, K]. Raises ValueError for shapes that do not fit."""
    (rows, inner), (columns, held) = x.shape, weight.shape
    if inner != held or inner % LANES or columns % LANES:
        raise ValueError(f"x {x.shape}, 4-bit weight {weight.shape}: both must be multiples of {LANES}, K the same")
    m, n = min(ROWS, -(-rows // ROW_TILE) * ROW_TILE), min(COLUMNS, columns)
    k = LANES * max(part for part in range(1, INNER // LANES + 1) if (inner // LANES) % part == 0)
    groups = k // LANES
    if groups % WORDS and k != inner:  # a table's block is whole registers, or all there is
        k = whole_groups(inner)
        groups = k // LANES
    steps, tables = inner // k, [weight.scale] if weight.zeros is None else [weight.scale, weight.zeros]
    of_table = pl.BlockSpec((None, n // LANES, groups, LANES), lambda i, j, s, layer: (layer[0], j, s, 0))
    moved = x.dtype.itemsize * m * k + n * k // 2 + 6 * m * n + 4 * len(tables) * n * groups
    return pl.pallas_call(
        partial(kernel, steps=steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(rows, m), pl.cdiv(columns, n), steps),
            in_specs=[
                pl.BlockSpec((m, k), lambda i, j, s, layer: (i, s)),
                pl.BlockSpec((None, n // WORDS, k), lambda i, j, s, layer: (layer[0], j, s)),
                *(of_table for _ in tables),
            ],
            out_specs=pl.BlockSpec((m, n), lambda i, j, s, layer: (i, j)),
            scratch_shapes=[pltpu.VMEM((m, n) if steps > 1 else (WORDS, LANES), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=2 * moved + SPARE_BYTES
        ),
        interpret=interpret,
        name="stacked_w4",
    )(weight.layer.reshape(1).astype(jnp.int32), x, weight.words, *tables)


def whole_groups(inner: int) -> int:
    """The most inputs of a block of which the groups are a multiple of 8; all inputs where there is none."""
    groups = inner // LANES
    fit = [part for part in range(WORDS, INNER // LANES + 1, WORDS) if groups % part == 0]
    return LANES * max(fit, default=groups)


def kernel(layer: Any, x: Any, words: Any, *rest: Any, steps: Any) -> None:
    """One block: x [m, k], words [n / 8, k], scale (and zeros) [n / 128, g, 128], out [m, n], sums of steps."""
    *tables, out, sums = rest
    step = pl.program_id(2)

    def columns_of(turn: Any, _: Any) -> Any:
        columns = pl.ds(pl.multiple_of(turn * LANES, LANES), LANES)
        own = words[pl.ds(pl.multiple_of(turn * (LANES // WORDS), WORDS), LANES // WORDS), :]
        total = group_sums(x, own, [table[turn] for table in tables])

        if steps == 1:
            out[:, columns] = total.astype(out.dtype)
            return 0

        @pl.when(step == 0)
        def _() -> None:
            sums[:, columns] = total

        @pl.when(step > 0)
        def _() -> None:
            sums[:, columns] += total

        @pl.when(step == steps - 1)
        def _() -> None:
            out[:, columns] = sums[:, columns].astype(out.dtype)

        return 0

    lax.fori_loop(0, out.shape[1] // LANES, columns_of, 0)


def group_sums(x: Any, words: Array, tables: list[Array]) -> Array:
    """f32 [m, 128]: groups' sums less zeros', times their scale. x: [m, k]; words: i32 [16, k]; a table: [g, 128]."""
    total = jnp.zeros((x.shape[0], LANES), jnp.float32)
    exact = x.dtype == jnp.float32  # 136 times the inputs, taken off again, would cost five of its bits
    for group in range(tables[0].shape[0]):
        lanes = slice(group * LANES, (group + 1) * LANES)
        inputs = x[:, lanes]
        codes, zero = unpacked(words[:, lanes]), 0.0 if exact else OFFSET
        codes = codes.astype(jnp.float32) - OFFSET if exact else codes
        sums = dot(inputs, codes, jnp.float32)
        zero = zero + tables[1][group : group + 1] if len(tables) > 1 else zero
        less = jnp.sum(inputs.astype(jnp.float32), axis=1, keepdims=True) * zero
        total += (sums - less) * tables[0][group : group + 1]
    return total
