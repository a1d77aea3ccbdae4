"""The decoder: a loop over ArchSpec.layers. Twin of jax_models/decoder.py.

Built once by backends/torch/runner.py; parameters are plain tensors, nothing here is trained.
Letters: T tokens · D width · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cuda_kernels.dispatch import Work
from cuda_kernels.quant_weight import Weight
from engine.specs import arch
from engine.specs.arch import ArchSpec, LayerSpec
from engine.specs.rope import frequencies
from torch_models.attention import Attention
from torch_models.ffn import GatedFfn
from torch_models.layers import embed, head, rms_norm

Params = Mapping[str, Any]
"""{"embed", "final_norm", "head" (absent when tied), "layers": of each layer part name -> tensor, or a Weight}"""

Turns = dict[arch.RopeSpec | None, tuple[Tensor | None, Tensor | None]]
"""cos and sin, f32 [T, R / 2], of each kind of rope"""


class Layer(nn.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)); with sandwich norms a further norm before each addition."""

    def __init__(self, spec: LayerSpec, params: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.mixer = Attention(spec.mixer, spec.norms, params)
        self.ffn = GatedFfn(spec.ffn, params)
        self.attn_norm = params["attn_norm"]  # [D]
        self.post_attn_norm = params.get("post_attn_norm")  # [D]
        self.ffn_norm = params["ffn_norm"]  # [D]
        self.post_ffn_norm = params.get("post_ffn_norm")  # [D]

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: Tensor, layer_index: int, work: Work
    ) -> tuple[Tensor, Tensor]:
        """x: [T, D] -> ([T, D], cache)."""
        eps, offset = self.spec.norms.eps, self.spec.norms.offset
        mixed, cache = self.mixer.forward(rms_norm(x, self.attn_norm, eps, offset), cos, sin, cache, layer_index, work)
        if self.spec.norms.sandwich:
            mixed = rms_norm(mixed, self.post_attn_norm, eps, offset)
        x = x + mixed
        fed = self.ffn.forward(rms_norm(x, self.ffn_norm, eps, offset))
        if self.spec.norms.sandwich:
            fed = rms_norm(fed, self.post_ffn_norm, eps, offset)
        return x + fed, cache


class Decoder(nn.Module):
    """Token ids to the last hidden states, and hidden states to logits."""

    def __init__(self, spec: ArchSpec, params: Params, max_model_len: int) -> None:
        super().__init__()
        self.spec = spec
        self.max_model_len = max_model_len
        self.embed = params["embed"]  # [V, D]
        self.layers = nn.ModuleList(
            [Layer(layer, part) for layer, part in zip(spec.layers, params["layers"], strict=True)]
        )
        self.final_norm = params["final_norm"]  # [D]
        self.head: Weight = params["embed"] if spec.tied_embeddings else params["head"]  # [V, D]
        self.frequencies: dict[arch.RopeSpec, tuple[Tensor, float]] = {}
        for layer in spec.layers:
            if layer.mixer.rope is not None and layer.mixer.rope not in self.frequencies:
                inv_freq, attention_scale = frequencies(layer.mixer.rope, max_model_len)
                self.frequencies[layer.mixer.rope] = torch.from_numpy(inv_freq).to(self.embed.device), attention_scale

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[Tensor],
        places: Sequence[tuple[int, int, int]],
        works: Sequence[Work],
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states after the final norm, [T, D], and the caches with this step's keys and values.

        token_ids: i64 [T] in [0, V); positions: i64 [T]; caches: one a pool;
        places: per layer (group, pool, index of the layer within its pool); works: one a group.
        """
        x = embed(token_ids, self.embed, self.spec.embedding_scale)
        turns = self.turns(positions)
        for layer, (group, pool, layer_index) in zip(self.layers, places, strict=True):
            cos, sin = turns[layer.spec.mixer.rope]
            x, caches[pool] = layer.forward(x, cos, sin, caches[pool], layer_index, works[group])
        norm = self.spec.final_norm
        return rms_norm(x, self.final_norm, norm.eps, norm.offset), caches

    def turns(self, positions: Tensor) -> Turns:
        """cos and sin, f32 [T, R / 2], of each kind of rope among the layers. positions: i64 [T]."""
        turns: Turns = {None: (None, None)}
        for rope, (inv_freq, attention_scale) in self.frequencies.items():
            angles = positions.float()[:, None] * inv_freq
            turns[rope] = (torch.cos(angles) * attention_scale, torch.sin(angles) * attention_scale)
        return turns

    def logits(self, hidden: Tensor) -> Tensor:
        """f32 [T, V]. hidden: [T, D], as forward gave it."""
        return head(hidden, self.head, self.spec)
