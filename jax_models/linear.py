"""Matrix products against [out, in] weights. Twin of torch_models/linear.py.

Sums are float32 whatever the weights are; [out, in] lets a CPU stream each weight once.
Letters: T tokens · I in · O out.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch, ranks
from pallas_kernels.quant_linear import QuantWeight, Weight
from pallas_kernels.tpu_stacked import StackedNibbles

NIBBLES, ZEROS = "_w4", "_w4_zeros"
LAYER = "layer"  # which layer of stacks is meant


def weight_of(parts: Mapping[str, Array], name: str) -> Weight:
    """The weight `name`, with its scales where it is kept as codes: their name says what its inputs are rounded to."""
    for end, rounded in (("_int8", "int8"), ("_e4m3", "e4m3"), ("_blocks", "blocks"), ("_scale", "")):
        if name + end in parts:
            return QuantWeight(parts[name], parts[name + end], parts.get(f"{name}_act_scale"), rounded)
    if name + NIBBLES in parts:
        words, scale, zeros = parts[name], parts[name + NIBBLES], parts.get(name + ZEROS)
        if LAYER not in parts:  # of this layer alone
            words, scale, zeros = words[None], scale[None], None if zeros is None else zeros[None]
        return StackedNibbles(words=words, scale=scale, zeros=zeros, layer=parts.get(LAYER, jnp.int32(0)))
    return parts[name]


def linear_sum(x: Array, weight: Weight, bias: Array | None = None) -> Array:
    """As linear, where x and weight are a rank's inputs: what the ranks give is added, then the bias.

    x: [T, I / ranks]; weight: [O, I / ranks]; bias: [O].
    """
    if not ranks.is_split():
        return linear(x, weight, bias)
    total = ranks.sum_ranks(dispatch.linear_f32(x, weight, is_part=True), x.dtype)
    return (total if bias is None else total + bias.astype(jnp.float32)).astype(x.dtype)


def linear(x: Array, weight: Weight, bias: Array | None = None) -> Array:
    """x @ weight.T + bias, of x's dtype. x: [T, I]; weight: [O, I]; bias: [O]."""
    if bias is None:
        return dispatch.linear(x, weight)
    return (dispatch.linear_f32(x, weight) + bias.astype(jnp.float32)).astype(x.dtype)
