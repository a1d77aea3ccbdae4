"""The decoder on an NVIDIA GPU: norms of heads, rope and the write into pages are one launch of a layer.

The mathematics is that of decoder.py and attention.py; the parameters are theirs. Made by backends/jax/forward.py where
pallas_kernels.dispatch.turns_heads says yes. Letters: T tokens · D width · N query heads · K KV heads · H head size ·
R turned dims of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import Array

from engine.specs import arch
from engine.specs.arch import ArchSpec, LayerSpec
from jax_models.attention import Attention
from jax_models.decoder import Decoder, Layer, Params
from jax_models.linear import linear, linear_sum
from pallas_kernels.dispatch import Work, turned_attention

HEAD_NORMS = ("q_norm", "k_norm")
"""Parts of a layer that may come as (stack [layers, H], index): the kernel reads the row where it lies."""


class TurnedAttention(Attention):
    """Attention from the product of q, k and v on as one call."""

    def __init__(self, spec: arch.Attention, norms: arch.Norms, params: Mapping[str, Any]) -> None:
        super().__init__(spec, norms, {name: part for name, part in params.items() if name not in HEAD_NORMS})
        weights = [params[name] for name in HEAD_NORMS if name in params]
        rows = [part if isinstance(part, tuple) else (part[None], 0) for part in weights]
        self.head_norms = nnx.data(tuple(stack for stack, _ in rows))  # [layers, H] each
        self.norm_row = rows[0][1] if rows else 0

    def __call__(
        self, x: Array, cos: Array | None, sin: Array | None, cache: Array, layer_index: int, work: Work
    ) -> tuple[Array, Array]:
        """x: [T, D]; cos, sin: f32 [T, R / 2], None without rope -> ([T, D], cache with this step's tokens)."""
        spec = self.spec
        out, cache = turned_attention(
            linear(x, self.qkv, self.qkv_bias).reshape(x.shape[0], -1, spec.head_size),
            self.head_norms,
            None if cos is None else (cos, sin),
            cache,
            layer_index,
            work,
            num_heads=spec.num_heads,
            norm_row=self.norm_row,
            eps=self.norms.eps,
            offset=self.norms.offset,
            scale=spec.scale,
            window=spec.window,
            logit_cap=spec.logit_cap,
        )
        out = out.reshape(x.shape[0], spec.num_heads * spec.head_size)
        return linear_sum(out, self.o, self.o_bias), cache


class TurnedLayer(Layer):
    """A layer with that attention."""

    def __init__(self, spec: LayerSpec, params: Mapping[str, Array]) -> None:
        super().__init__(spec, params)
        self.mixer = TurnedAttention(spec.mixer, spec.norms, params)


class TurnedDecoder(Decoder):
    """A decoder of such layers."""

    def __init__(self, spec: ArchSpec, params: Params, max_model_len: int) -> None:
        super().__init__(spec, params, max_model_len)
        self.layers = nnx.List(
            [TurnedLayer(layer, part) for layer, part in zip(spec.layers, params["layers"], strict=True)]
        )
