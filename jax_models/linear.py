"""Matrix products against [out, in] weights. Twin of torch_models/linear.py.

On the CPU a product must be asked for float32 output to be fast in bfloat16, and [out, in] streams each weight once.
Letters: T tokens · I in · O out.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x @ weight.T + bias, of x's dtype. x: [T, I]; weight: [O, I]; bias: [O]."""
    out = linear_f32(x, weight)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype)


def linear_f32(x: Array, weight: Array) -> Array:
    """x @ weight.T, f32 [T, O]. x: [T, I]; weight: [O, I]."""
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
