"""Matrix products against [out, in] weights. Twin of torch_models/linear.py.

Sums are float32 whatever the weights are; [out, in] lets a CPU stream each weight once.
Letters: T tokens · I in · O out.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.dispatch import linear_f32


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x @ weight.T + bias, of x's dtype. x: [T, I]; weight: [O, I]; bias: [O]."""
    out = linear_f32(x, weight)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype)
