"""Small pieces of a decoder: norm, rotary turn, embedding, output head. Twin of torch_models/layers.py.

Called by attention.py, ffn.py and decoder.py. Sums and norms are float32 whatever the activations are.
Letters: T tokens · D width · N heads · H head size · V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from engine.specs.arch import ArchSpec
from pallas_kernels.dispatch import linear_f32, take_split_rows
from pallas_kernels.quant_linear import Weight

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def rms_norm(x: Array, weight: Array, eps: float, offset: float) -> Array:
    """x / rms(x) * (weight + offset) over the last axis. x: [..., D]; weight: [D]."""
    wide = x.astype(jnp.float32)
    scaled = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (scaled * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the first R dims of each head, halves convention. x: [T, N, H]; cos, sin: f32 [T, R / 2]."""
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    wide_first, wide_second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = (wide_first * cos - wide_second * sin, wide_second * cos + wide_first * sin)
    return jnp.concatenate([part.astype(x.dtype) for part in turned] + [rest], axis=-1)


def embed(token_ids: Array, table: Array, scale: float) -> Array:
    """Rows of the table, times scale rounded to the table's dtype. token_ids: i32 [T] in [0, V); table: [V, D]."""
    rows = take_split_rows(table, token_ids)
    return rows if scale == 1.0 else rows * jnp.asarray(scale, table.dtype)


def head(hidden: Array, table: Weight, spec: ArchSpec) -> Array:
    """Logits f32 [T, V]. hidden: [T, D], already normed; table: [V, D]."""
    logits = linear_f32(hidden, table)
    if spec.logit_scale != 1.0:
        logits = logits * spec.logit_scale
    if spec.logit_cap is not None:
        logits = spec.logit_cap * jnp.tanh(logits / spec.logit_cap)
    return logits
