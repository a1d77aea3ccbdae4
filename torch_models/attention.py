"""Attention mixers. Twin of jax_models/attention.py.

The body is mathematics only; keys and values are written and read by the one function of cuda_kernels.dispatch.
Letters: T tokens · D width · N query heads · K KV heads · H head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cuda_kernels.dispatch import Work, decode_attention, paged_attention
from cuda_kernels.quant_weight import Weight
from engine.specs import arch
from torch_models.layers import rms_norm, rotate
from torch_models.linear import linear


class Attention(nn.Module):
    """Grouped-query attention over a paged cache. q, k and v are rows of one weight."""

    def __init__(self, spec: arch.Attention, norms: arch.Norms, params: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.norms = norms
        self.qkv: Weight = params["qkv"]  # [(N + 2K) * H, D]
        self.qkv_bias = params.get("qkv_bias")  # [(N + 2K) * H]
        self.q_norm = params.get("q_norm")  # [H]
        self.k_norm = params.get("k_norm")  # [H]
        if spec.qk_norm:  # [N + K, H]
            each = torch.stack([self.q_norm] * spec.num_heads + [self.k_norm] * spec.num_kv_heads)
            self.qk_norm = each.float() + norms.offset
        self.o: Weight = params["o"]  # [D, N * H]
        self.o_bias = params.get("o_bias")  # [D]

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: Tensor, layer_index: int, work: Work
    ) -> tuple[Tensor, Tensor]:
        """x: [T, D]; cos, sin: f32 [T, R / 2], None without rope -> ([T, D], cache holding this step too)."""
        spec = self.spec
        if work.one_call:  # norm and turn are the kernel's
            qkv = linear(x, self.qkv, self.qkv_bias)
            out = decode_attention(
                qkv,
                (cos, sin),
                cache,
                layer_index,
                work,
                num_heads=spec.num_heads,
                norm=self.qk_norm if spec.qk_norm else None,
                norm_eps=self.norms.eps,
                scale=spec.scale,
                window=spec.window,
                logit_cap=spec.logit_cap,
            )
            return linear(out, self.o, self.o_bias), cache
        q, k, v = self.turned(x, cos, sin)
        out, cache = paged_attention(
            q, k, v, cache, layer_index, work, scale=spec.scale, window=spec.window, logit_cap=spec.logit_cap
        )
        out = out.reshape(x.shape[0], spec.num_heads * spec.head_size)
        return linear(out, self.o, self.o_bias), cache

    def turned(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x: [T, D] -> q [T, N, H], k and v [T, K, H], normed and turned."""
        qk, v = self.project(x)
        if self.spec.qk_norm:
            qk = rms_norm(qk, self.qk_norm, self.norms.eps, 0.0)
        if cos is not None:
            qk = rotate(qk, cos, sin)
        return qk[:, : self.spec.num_heads], qk[:, self.spec.num_heads :], v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, D] -> q and k [T, N + K, H], which are normed and turned in one go, v [T, K, H]."""
        heads, kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        qkv = linear(x, self.qkv, self.qkv_bias).reshape(x.shape[0], heads + 2 * kv_heads, self.spec.head_size)
        return qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
