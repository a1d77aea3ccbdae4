"""Feed-forward parts of a layer. Twin of jax_models/ffn.py. Letters: T tokens · D width · F ffn width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cuda_kernels.quant_weight import Weight
from engine.specs import arch
from torch_models.layers import ACTIVATIONS
from torch_models.linear import linear


class GatedFfn(nn.Module):
    """down(act(gate(x)) * up(x)); gate and up are rows of one weight."""

    def __init__(self, spec: arch.GatedFfn, params: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.gate_up: Weight = params["gate_up"]  # [2F, D]
        self.gate_up_bias = params.get("gate_up_bias")  # [2F]
        self.down: Weight = params["down"]  # [D, F]
        self.down_bias = params.get("down_bias")  # [D]

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, D] -> [T, D]."""
        gate, up = linear(x, self.gate_up, self.gate_up_bias).chunk(2, dim=-1)
        hidden = ACTIVATIONS[self.spec.activation](gate).mul_(up)
        return linear(hidden, self.down, self.down_bias)
