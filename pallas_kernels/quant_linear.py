"""Products with weights in few bits: inputs rounded as the checkpoint says, codes multiplied, scales behind that.

A TPU multiplies int8 by int8 as they lie; e4m3 weights are widened on the way to the matrix unit. Elsewhere codes are
kept in the activations' type, which holds each exactly, and plain products multiply them. Called by dispatch.py.
Letters: T tokens · I in · O out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.tpu_stacked import StackedNibbles

LIMITS = {"int8": 127.0, "e4m3": 448.0}
BLOCK = 128  # inputs that share a scale
SMALLEST = 1e-12  # a scale of a row of zeros: anything but 0


@partial(jax.tree_util.register_dataclass, data_fields=("data", "scale", "act_scale"), meta_fields=("rounded",))
@dataclass(frozen=True, slots=True)
class QuantWeight:
    """A weight [O, I] as codes and scales.

    data: [O, I], int8, e4m3, or such numbers in the activations' type; scale: f32 [O]; act_scale: f32 [n], n equal
    numbers: the fixed scale of the inputs, None: a scale a token. rounded: what inputs are rounded to, "int8", "e4m3",
    "blocks" (e4m3 with a scale for every 128), or "": not at all.
    """

    data: Array
    scale: Array
    act_scale: Array | None
    rounded: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


Weight = Array | QuantWeight | StackedNibbles


def round_inputs(x: Array, weight: QuantWeight, axis: str | None) -> tuple[Array, Array]:
    """(codes f32 [T, I], their scales f32 [T, 1]). axis: the mesh axis over which a token's inputs are split.

    What is not finite must not become a number: the scale of such a token is NaN.
    """
    limit = LIMITS[weight.rounded]
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=1, keepdims=True)
    if axis is not None:
        largest = lax.pmax(largest, axis)
    fixed = weight.act_scale
    scale = jnp.maximum(largest, SMALLEST) / limit if fixed is None else jnp.broadcast_to(fixed[0], largest.shape)
    scale = jnp.where(jnp.isfinite(largest), scale, jnp.nan)
    ratio = wide / scale
    if weight.rounded == "int8":
        ratio = jnp.round(jnp.where(jnp.isnan(ratio), 0.0, ratio))
        return jnp.clip(ratio, -limit - (fixed is not None), limit), scale
    return jnp.clip(ratio, -limit, limit).astype(jnp.float8_e4m3fn).astype(jnp.float32), scale


def round_blocks(x: Array) -> Array:
    """What e4m3 leaves of x, f32 [T, I], each 128 inputs by their own scale; NaN where one of a block is not finite."""
    tokens, inputs = x.shape
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -inputs % BLOCK))).reshape(tokens, -1, BLOCK)
    largest = jnp.max(jnp.abs(wide), axis=2, keepdims=True)
    scale = jnp.where(jnp.isfinite(largest), jnp.maximum(largest, SMALLEST) / LIMITS["e4m3"], jnp.nan)
    codes = jnp.clip(wide / scale, -LIMITS["e4m3"], LIMITS["e4m3"]).astype(jnp.float8_e4m3fn)
    return (codes.astype(jnp.float32) * scale).reshape(tokens, -1)[:, :inputs]


def product(x: Array, data: Array) -> Array:
    """x @ data.T of codes, f32 [T, O]. x: f32 [T, I], rounded; data: int8 or e4m3 [O, I]."""
    contract = (((1,), (1,)), ((), ()))
    if data.dtype == jnp.int8:
        return lax.dot_general(x.astype(jnp.int8), data, contract, preferred_element_type=jnp.int32).astype(jnp.float32)
    wide = jnp.bfloat16  # no matrix unit before that of tpu7x takes e4m3
    return lax.dot_general(x.astype(wide), data.astype(wide), contract, preferred_element_type=jnp.float32)
