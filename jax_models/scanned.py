"""The decoder as a scan over stacked weights: one body a run of equal layers, whatever their number.

What a TPU is given: a program a fraction of the size, few arguments, weights read where they lie. The mathematics is
that of decoder.py; the runs are ArchSpec.runs. Made by backends/jax/forward.py. Letters: T tokens · D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from engine.specs.arch import ArchSpec
from jax_models.decoder import Decoder, Layer, Params
from jax_models.layers import embed, rms_norm
from pallas_kernels.dispatch import Work


class ScannedDecoder(Decoder):
    """params["runs"]: a run: a mapping part -> [repeats, ...] for each layer of its period."""

    def __init__(self, spec: ArchSpec, params: Params, max_model_len: int) -> None:
        self.spec = spec
        self.max_model_len = max_model_len
        self.embed = params["embed"]  # [V, D]
        self.runs = nnx.data(params["runs"])
        self.final_norm = params["final_norm"]  # [D]
        self.head = params["embed"] if spec.tied_embeddings else params["head"]  # [V, D]

    def __call__(
        self,
        token_ids: Array,
        positions: Array,
        caches: list[Array],
        places: Sequence[tuple[int, int, int]],
        works: Sequence[Work],
    ) -> tuple[Array, list[Array]]:
        """As Decoder.__call__."""
        x = embed(token_ids, self.embed, self.spec.embedding_scale)
        turns = self.turns(positions)
        for (first, period, repeats), stacks in zip(self.spec.runs, self.runs, strict=True):
            size = len(period)
            of_layers = [places[first + n : first + n + size * repeats : size] for n in range(size)]
            indexes = [jnp.array([index for _, _, index in of_layer], jnp.int32) for of_layer in of_layers]

            def body(carry: Any, given: Any, period: Any = period, of_layers: Any = of_layers) -> Any:
                x, caches = carry
                caches = list(caches)
                for spec, of_layer, parts, index in zip(period, of_layers, *given, strict=True):
                    group, pool, _ = of_layer[0]
                    cos, sin = turns[spec.mixer.rope]
                    x, caches[pool] = Layer(spec, parts)(x, cos, sin, caches[pool], index, works[group])
                return (x, caches), None

            (x, caches), _ = lax.scan(body, (x, caches), (stacks, indexes))
        norm = self.spec.final_norm
        return rms_norm(x, self.final_norm, norm.eps, norm.offset), caches
