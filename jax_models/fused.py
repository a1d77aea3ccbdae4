"""The decoder for a few tokens on a CPU: each layer is one call of pallas_kernels.dispatch.decoder_layer.

The mathematics is that of decoder.py, attention.py and ffn.py; the parameters are theirs. Made by
backends/jax/forward.py for programs of so few tokens that has_whole_layers says yes.
Letters: T tokens · D width · R turned dims of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

from flax import nnx
from jax import Array

from engine.specs.arch import ArchSpec, LayerSpec
from jax_models.decoder import Decoder, Layer, Params
from pallas_kernels.dispatch import Work, decoder_layer


class FusedLayer(Layer):
    """A layer as one call."""

    def __init__(self, spec: LayerSpec, params: Mapping[str, Array]) -> None:
        super().__init__(spec, params)
        self.parts = nnx.data(dict(params))

    def __call__(
        self, x: Array, cos: Array | None, sin: Array | None, cache: Array, layer_index: int, work: Work
    ) -> tuple[Array, Array]:
        """x: [T, D]; cos, sin: f32 [T, R / 2], None without rope -> ([T, D], cache with this step's tokens)."""
        mixer, norms = self.spec.mixer, self.spec.norms
        return decoder_layer(
            x,
            self.parts,
            cos,
            sin,
            cache,
            layer_index,
            work,
            num_heads=mixer.num_heads,
            activation=self.spec.ffn.activation,
            eps=norms.eps,
            offset=norms.offset,
            scale=mixer.scale,
            window=mixer.window,
            logit_cap=mixer.logit_cap,
        )


class FusedDecoder(Decoder):
    """A decoder of fused layers."""

    def __init__(self, spec: ArchSpec, params: Params, max_model_len: int) -> None:
        super().__init__(spec, params, max_model_len)
        self.layers = nnx.List(
            [FusedLayer(layer, part) for layer, part in zip(spec.layers, params["layers"], strict=True)]
        )
