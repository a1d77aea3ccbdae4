"""The same decoder in few GPU launches: norms, products, residuals and activations together, attention in one call.

The mathematics of decoder.py, attention.py and ffn.py, in the order of a GPU's memory traffic; the parameters are
theirs. Called by backends/torch where there is a GPU and triton. Importing this needs triton.
Letters: T tokens · D width · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_kernels import fused, small_linear
from cuda_kernels.gpu_attention import GpuWork, HeadSpec, attend
from cuda_kernels.quant_weight import Weight
from engine.specs import arch
from torch_models.decoder import Decoder, Layer
from torch_models.layers import embed
from torch_models.linear import linear

Turns = dict[arch.RopeSpec | None, tuple[Tensor | None, Tensor | None]]


class FusedDecoder:
    """A Decoder's parameters, run in fused launches."""

    def __init__(self, decoder: Decoder) -> None:
        self.spec = decoder.spec
        self.embed = decoder.embed  # [V, D]
        self.final_norm = decoder.final_norm  # [D]
        self.head = decoder.head  # [V, D]
        self.layers = [(layer, head_spec(layer)) for layer in decoder.layers]  # type: ignore[arg-type]
        self.frequencies = decoder.frequencies

    def embedded(self, token_ids: Tensor) -> Tensor:
        """[T, D]. token_ids: [T] in [0, V)."""
        return embed(token_ids, self.embed, self.spec.embedding_scale)

    def run(
        self,
        x: Tensor,
        turns: Turns,
        caches: list[Tensor],
        places: Sequence[tuple[int, int, int]],
        works: Sequence[GpuWork],
    ) -> Tensor:
        """The residual stream behind the last layer, [T, D]. x: [T, D] embedded tokens; the rest as Decoder.forward."""
        for (layer, heads), (group, pool, layer_index) in zip(self.layers, places, strict=True):
            turn = turns[layer.spec.mixer.rope]
            x = run_layer(layer, heads, x, turn, caches[pool], layer_index, works[group])
        return x

    def logits(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """f32 [T, V]. x: [T, D], as run gave it; out: where to write."""
        norm, spec = self.spec.final_norm, self.spec
        if isinstance(self.head, Tensor):
            logits = small_linear.head(x, self.final_norm, norm.eps, norm.offset, self.head, out=out)
        else:
            scores = linear(fused.rms_norm(x, self.final_norm, norm.eps, norm.offset), self.head)
            logits = scores.float() if out is None else out.copy_(scores)
        return capped(logits, spec)


def capped(logits: Tensor, spec: arch.ArchSpec) -> Tensor:
    """The head's last steps, in place. logits: f32 [T, V]."""
    if spec.logit_scale != 1.0:
        logits.mul_(spec.logit_scale)
    if spec.logit_cap is not None:
        torch.mul(torch.tanh(logits / spec.logit_cap), spec.logit_cap, out=logits)
    return logits


def head_spec(layer: Layer) -> HeadSpec:
    spec, mixer = layer.spec.mixer, layer.mixer
    return HeadSpec(
        num_heads=spec.num_heads,
        scale=spec.scale,
        window=spec.window,
        logit_cap=spec.logit_cap,
        q_norm=mixer.q_norm if spec.qk_norm else None,
        k_norm=mixer.k_norm if spec.qk_norm else None,
        norm_eps=layer.spec.norms.eps,
        norm_offset=layer.spec.norms.offset,
    )


def run_layer(
    layer: Layer,
    heads: HeadSpec,
    x: Tensor,
    turn: tuple[Tensor | None, Tensor | None],
    cache: Tensor,
    layer_index: int,
    work: GpuWork,
) -> Tensor:
    """x: [T, D] -> [T, D]. decoder.Layer in at most five launches, seven with sandwich norms; few bits take more."""
    norms, mixer, ffn = layer.spec.norms, layer.mixer, layer.ffn
    qkv = norm_linear(x, layer.attn_norm, norms, mixer.qkv, mixer.qkv_bias)
    mixed = attend(qkv, turn, cache, layer_index, work, heads)
    if norms.sandwich:
        mixed = product(mixed, mixer.o, mixer.o_bias)
        x = x + fused.rms_norm(mixed, layer.post_attn_norm, norms.eps, norms.offset)
    else:
        x = linear_add(mixed, mixer.o, mixer.o_bias, x)
    gated = norm_gated(x, layer.ffn_norm, norms, ffn.gate_up, ffn.gate_up_bias, ffn.spec.activation)
    if norms.sandwich:
        fed = product(gated, ffn.down, ffn.down_bias)
        return x + fused.rms_norm(fed, layer.post_ffn_norm, norms.eps, norms.offset)
    return linear_add(gated, ffn.down, ffn.down_bias, x)


# small_linear takes plain weights; one in few bits is a product of its own between a norm and a gate kernel.


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias. x: [T, I]; weight: [O, I]; bias: [O] -> [T, O]."""
    return small_linear.linear(x, weight, bias) if isinstance(weight, Tensor) else linear(x, weight, bias)


def linear_add(x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x @ weight.T + bias. residual: [T, O], the caller's no more -> [T, O]."""
    if isinstance(weight, Tensor):
        return small_linear.linear_add(x, weight, bias, residual)
    return residual.add_(linear(x, weight, bias))


def norm_linear(x: Tensor, norm: Tensor, norms: arch.Norms, weight: Weight, bias: Tensor | None) -> Tensor:
    """rms_norm(x) @ weight.T + bias. x: [T, I]; norm: f32 [I]; weight: [O, I] -> [T, O]."""
    if isinstance(weight, Tensor):
        return small_linear.norm_linear(x, norm, norms.eps, norms.offset, weight, bias)
    return linear(fused.rms_norm(x, norm, norms.eps, norms.offset), weight, bias)


def norm_gated(
    x: Tensor, norm: Tensor, norms: arch.Norms, gate_up: Weight, bias: Tensor | None, activation: str
) -> Tensor:
    """act(gate) * up of rms_norm(x). x: [T, I]; norm: f32 [I]; gate_up: [2F, I]; bias: [2F] -> [T, F]."""
    if isinstance(gate_up, Tensor):
        return small_linear.norm_gated(x, norm, norms.eps, norms.offset, gate_up, bias, activation)
    return fused.gated(norm_linear(x, norm, norms, gate_up, bias), activation)
