"""Attention mixers. Twin of torch_models/attention.py.

The body is mathematics only; keys and values are written and read by the one function of pallas_kernels.dispatch.
Letters: T tokens · D width · N query heads · K KV heads · H head size.
"""

from __future__ import annotations

from collections.abc import Mapping

from flax import nnx
from jax import Array

from engine.specs import arch
from jax_models.layers import rms_norm, rotate
from jax_models.linear import linear, linear_sum, weight_of
from pallas_kernels.dispatch import Cache, Work, paged_attention


class Attention(nnx.Module):
    """Grouped-query attention over a paged cache. q, k and v are rows of one weight."""

    def __init__(self, spec: arch.Attention, norms: arch.Norms, params: Mapping[str, Array]) -> None:
        self.spec = spec
        self.norms = norms
        self.qkv = nnx.data(weight_of(params, "qkv"))  # [(N + 2K) * H, D]
        self.qkv_bias = params.get("qkv_bias")  # [(N + 2K) * H]
        self.q_norm = params.get("q_norm")  # [H]
        self.k_norm = params.get("k_norm")  # [H]
        self.o = nnx.data(weight_of(params, "o"))  # [D, N * H]
        self.o_bias = params.get("o_bias")  # [D]

    def __call__(
        self, x: Array, cos: Array | None, sin: Array | None, cache: Cache, layer_index: int, work: Work
    ) -> tuple[Array, Cache]:
        """x: [T, D]; cos, sin: f32 [T, R / 2], None without rope -> ([T, D], cache with this step's tokens)."""
        spec = self.spec
        q, k, v = self.turned(x, cos, sin)
        out, cache = paged_attention(
            q, k, v, cache, layer_index, work, scale=spec.scale, window=spec.window, logit_cap=spec.logit_cap
        )
        out = out.reshape(x.shape[0], spec.num_heads * spec.head_size)
        return linear_sum(out, self.o, self.o_bias), cache

    def turned(self, x: Array, cos: Array | None, sin: Array | None) -> tuple[Array, Array, Array]:
        """x: [T, D] -> q [T, N, H], k and v [T, K, H], normed and turned."""
        q, k, v = self.project(x)
        if self.spec.qk_norm:
            q = rms_norm(q, self.q_norm, self.norms.eps, self.norms.offset)
            k = rms_norm(k, self.k_norm, self.norms.eps, self.norms.offset)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """x: [T, D] -> q [T, N, H], k [T, K, H], v [T, K, H]."""
        heads, kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        qkv = linear(x, self.qkv, self.qkv_bias).reshape(x.shape[0], heads + 2 * kv_heads, self.spec.head_size)
        return qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
