"""The decoder as a scan: one body a run of equal layers (ArchSpec.runs), whatever their number.

What a TPU is given: a program a fraction of the size, few arguments, weights read where they lie in stacks of layers
of the same shapes. The mathematics is that of decoder.py. Made by backends/jax/forward.py. Letters: T tokens · D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from engine.specs.arch import ArchSpec
from jax_models.decoder import Decoder, Layer, Params
from jax_models.layers import embed, rms_norm
from jax_models.linear import LAYER, NIBBLES, ZEROS, weight_of
from pallas_kernels.dispatch import Cache, Work
from pallas_kernels.ranks import all_tokens


class ScannedDecoder(Decoder):
    """params["stacks"]: mappings part -> [layers, ...]; stack_places: layer -> (stack, index in it)."""

    def __init__(
        self, spec: ArchSpec, params: Params, max_model_len: int, stack_places: Mapping[int, tuple[int, int]]
    ) -> None:
        self.spec = spec
        self.max_model_len = max_model_len
        self.embed = params["embed"]  # [V, D]
        self.stacks = nnx.data(params["stacks"])
        self.stack_places = dict(stack_places)
        self.final_norm = params["final_norm"]  # [D]
        self.head = nnx.data(params["embed"] if spec.tied_embeddings else weight_of(params, "head"))  # [V, D]

    def __call__(
        self,
        token_ids: Array,
        positions: Array,
        caches: list[Cache],
        places: Sequence[tuple[int, int, int]],
        works: Sequence[Work],
    ) -> tuple[Array, list[Cache]]:
        """As Decoder.__call__."""
        x = embed(token_ids, self.embed, self.spec.embedding_scale)
        turns = self.turns(positions)
        for first, period, repeats in self.spec.runs:
            layers = [range(first + n, first + n + len(period) * repeats, len(period)) for n in range(len(period))]
            indexes = [
                jnp.array([[places[layer][2], self.stack_places[layer][1]] for layer in of_place], jnp.int32)
                for of_place in layers
            ]

            def body(carry: Any, given: Any, period: Any = period, first: int = first) -> Any:
                x, caches = carry
                caches = list(caches)
                for layer, (spec, (in_pool, in_stack)) in enumerate(zip(period, given, strict=True), first):
                    group, pool, _ = places[layer]
                    stack = self.stacks[self.stack_places[layer][0]]
                    parts = layer_parts(stack, in_stack)
                    cos, sin = turns[spec.mixer.rope]
                    x, caches[pool] = Layer(spec, parts)(x, cos, sin, caches[pool], in_pool, works[group])
                return (x, caches), None

            (x, caches), _ = lax.scan(body, (x, caches), indexes)
        norm = self.spec.final_norm
        return all_tokens(rms_norm(x, self.final_norm, norm.eps, norm.offset)), caches


def layer_parts(stack: Mapping[str, Array], index: Array) -> dict[str, Array]:
    """The parts of a layer: its own piece of each array [layers, ...], but weights of 4 bits whole, read by index."""
    whole = {part.removesuffix(end) for part in stack for end in (NIBBLES, ZEROS) if part.endswith(end)}
    whole |= {part for part in stack if part.endswith((NIBBLES, ZEROS))}
    parts = {
        part: array if part in whole else lax.dynamic_index_in_dim(array, index, 0, False)
        for part, array in stack.items()
    }
    return parts | {LAYER: index} if whole else parts
