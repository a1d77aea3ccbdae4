"""Feed-forward parts of a layer. Twin of torch_models/ffn.py. Letters: T tokens · D width · F ffn width."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jax import Array

from engine.specs import arch
from jax_models.layers import ACTIVATIONS
from jax_models.linear import linear, linear_sum, weight_of


class GatedFfn(nnx.Module):
    """down(act(gate(x)) * up(x)); gate and up are rows of one weight."""

    def __init__(self, spec: arch.GatedFfn, params: Mapping[str, Array]) -> None:
        self.spec = spec
        self.gate_up = nnx.data(weight_of(params, "gate_up"))  # [2F, D]
        self.gate_up_bias = params.get("gate_up_bias")  # [2F]
        self.down = nnx.data(weight_of(params, "down"))  # [D, F]
        self.down_bias = params.get("down_bias")  # [D]

    def __call__(self, x: Array) -> Array:
        """x: [T, D] -> [T, D]."""
        gate, up = jnp.split(linear(x, self.gate_up, self.gate_up_bias), 2, axis=-1)
        hidden = ACTIVATIONS[self.spec.activation](gate) * up
        return linear_sum(hidden, self.down, self.down_bias)
