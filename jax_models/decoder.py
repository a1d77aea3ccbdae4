"""The decoder: a loop over ArchSpec.layers. Twin of torch_models/decoder.py.

Called by backends/jax/compile.py while it traces a program; modules are built from the traced parameters, so nothing
here outlives a trace. Letters: T tokens · D width · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from engine.specs import arch
from engine.specs.arch import ArchSpec, LayerSpec
from engine.specs.rope import frequencies
from jax_models.attention import Attention
from jax_models.ffn import GatedFfn
from jax_models.layers import embed, head, rms_norm
from jax_models.linear import weight_of
from pallas_kernels.dispatch import Cache, Work
from pallas_kernels.ranks import all_tokens

Params = Mapping[str, Any]
"""{"embed", "final_norm", "head" (absent when tied), "layers": one mapping of part name -> array a layer}"""


class Layer(nnx.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)); with sandwich norms a further norm before each addition."""

    def __init__(self, spec: LayerSpec, params: Mapping[str, Array]) -> None:
        self.spec = spec
        self.mixer = Attention(spec.mixer, spec.norms, params)
        self.ffn = GatedFfn(spec.ffn, params)
        self.attn_norm = params["attn_norm"]  # [D]
        self.post_attn_norm = params.get("post_attn_norm")  # [D]
        self.ffn_norm = params["ffn_norm"]  # [D]
        self.post_ffn_norm = params.get("post_ffn_norm")  # [D]

    def __call__(
        self, x: Array, cos: Array | None, sin: Array | None, cache: Cache, layer_index: int, work: Work
    ) -> tuple[Array, Cache]:
        """x: [T, D], or a rank's tokens of it (ranks.split_over) -> (the same, cache)."""
        eps, offset = self.spec.norms.eps, self.spec.norms.offset
        normed = all_tokens(rms_norm(x, self.attn_norm, eps, offset))
        mixed, cache = self.mixer(normed, cos, sin, cache, layer_index, work)
        if self.spec.norms.sandwich:
            mixed = rms_norm(mixed, self.post_attn_norm, eps, offset)
        x = x + mixed
        fed = self.ffn(all_tokens(rms_norm(x, self.ffn_norm, eps, offset)))
        if self.spec.norms.sandwich:
            fed = rms_norm(fed, self.post_ffn_norm, eps, offset)
        return x + fed, cache


class Decoder(nnx.Module):
    """Token ids to the last hidden states, and hidden states to logits."""

    def __init__(self, spec: ArchSpec, params: Params, max_model_len: int) -> None:
        self.spec = spec
        self.max_model_len = max_model_len
        self.embed = params["embed"]  # [V, D]
        self.layers = nnx.List([Layer(layer, part) for layer, part in zip(spec.layers, params["layers"], strict=True)])
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
        """Hidden states after the final norm, [T, D], and the caches with this step's keys and values.

        token_ids: i32 [T] in [0, V); positions: i32 [T]; caches: one a pool;
        places: per layer (group, pool, index of the layer within its pool); works: one a group.
        """
        x = embed(token_ids, self.embed, self.spec.embedding_scale)
        turns = self.turns(positions)
        for layer, (group, pool, layer_index) in zip(self.layers, places, strict=True):
            cos, sin = turns[layer.spec.mixer.rope]
            x, caches[pool] = layer(x, cos, sin, caches[pool], layer_index, works[group])
        norm = self.spec.final_norm
        return all_tokens(rms_norm(x, self.final_norm, norm.eps, norm.offset)), caches

    def turns(self, positions: Array) -> dict[arch.RopeSpec | None, tuple[Array | None, Array | None]]:
        """cos and sin, f32 [T, R / 2], of each kind of rope among the layers. positions: i32 [T]."""
        turns: dict[arch.RopeSpec | None, tuple[Array | None, Array | None]] = {None: (None, None)}
        for layer in self.spec.layers:
            rope = layer.mixer.rope
            if rope not in turns:
                inv_freq, attention_scale = frequencies(rope, self.max_model_len)
                angles = positions.astype(jnp.float32)[:, None] * inv_freq
                turns[rope] = (jnp.cos(angles) * attention_scale, jnp.sin(angles) * attention_scale)
        return turns

    def logits(self, hidden: Array) -> Array:
        """f32 [T, V]. hidden: [T, D], as __call__ gave it."""
        return head(hidden, self.head, self.spec)
