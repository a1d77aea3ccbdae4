"""The same decoder in few GPU launches: norms, products, residuals and activations together, attention in one call.

The mathematics of decoder.py, attention.py and ffn.py, in the order of a GPU's memory traffic; the parameters are
theirs. Called by backends/torch where there is a GPU and triton. Importing this needs triton.
Letters: T tokens · D width · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels import fused, small_linear
from cuda_kernels.gpu_attention import GpuWork, HeadSpec, attend
from cuda_kernels.rope_cache import rope_and_write
from cuda_kernels.split_sum import Sum
from engine.specs import arch
from torch_models.decoder import Decoder, Layer, Turns
from torch_models.ffn import GatedFfn
from torch_models.fused_products import (
    Stream,
    add_product,
    added_up,
    fused_quant_linear,
    gated_product,
    norm_gated,
    norm_linear,
    product,
)
from torch_models.layers import embed


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of a step that are sampled from, each the newest of its row: a decode step of their own."""

    tokens: Tensor  # i64 [S], places in the step
    works: Sequence[GpuWork]  # of each group, for rows of one token


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
        *,
        but_last: bool = False,
    ) -> Tensor:
        """The residual stream behind the last layer, [T, D]. x: [T, D] embedded tokens; the rest as Decoder.forward.

        but_last: in front of the last layer, which `finish` does.
        """
        count = len(self.layers) - but_last
        stream: Stream = x
        for (layer, heads), (group, pool, layer_index) in zip(self.layers[:count], places[:count], strict=True):
            turn = turns[layer.spec.mixer.rope]
            stream = run_layer(layer, heads, stream, turn, caches[pool], layer_index, works[group])
        return added_up(stream)

    def finish(
        self,
        x: Tensor,
        turns: Turns,
        caches: list[Tensor],
        places: Sequence[tuple[int, int, int]],
        works: Sequence[GpuWork],
        sampled: Sampled,
    ) -> Tensor:
        """The last layer: keys and values of all tokens, the residual stream of the sampled ones, [S, D].

        x: [T, D], of `run` with but_last, and left as it is. Nothing reads what the last layer makes of other tokens.
        """
        self.write_last(x, turns, caches, places, works)
        chosen, turn = x[sampled.tokens], turns[self.layers[-1][0].spec.mixer.rope]
        if not len(chosen):
            return chosen
        cos, sin = (None if part is None else part[sampled.tokens] for part in turn)
        return self.behind(chosen, (cos, sin), caches, places, sampled.works)

    def write_last(
        self,
        x: Tensor,
        turns: Turns,
        caches: list[Tensor],
        places: Sequence[tuple[int, int, int]],
        works: Sequence[GpuWork],
    ) -> None:
        """The keys and values of `finish`. x: [T, D], left as it is."""
        (layer, heads), (group, pool, layer_index) = self.layers[-1], places[-1]
        turn = turns[layer.spec.mixer.rope]
        write_keys(layer, heads, x, turn, caches[pool], layer_index, works[group])

    def behind(
        self,
        x: Tensor,
        turn: tuple[Tensor | None, Tensor | None],
        caches: list[Tensor],
        places: Sequence[tuple[int, int, int]],
        works: Sequence[GpuWork],
    ) -> Tensor:
        """The last layer of sampled tokens behind `write_last`. x: [S, D], the caller's no more; turn: of them."""
        (layer, heads), (group, pool, layer_index) = self.layers[-1], places[-1]
        return added_up(run_layer(layer, heads, x, turn, caches[pool], layer_index, works[group]))

    def logits(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """f32 [T, V]. x: [T, D], as run gave it; out: where to write."""
        norm, spec = self.spec.final_norm, self.spec
        if isinstance(self.head, Tensor):
            logits = small_linear.head(x, self.final_norm, norm.eps, norm.offset, self.head, out=out)
        else:
            scores = norm_linear(x, self.final_norm, norm, self.head, None)
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
    x: Stream,
    turn: tuple[Tensor | None, Tensor | None],
    cache: Tensor,
    layer_index: int,
    work: GpuWork,
) -> Stream:
    """x: [T, D] -> [T, D]. decoder.Layer in at most five launches, seven with sandwich norms; few bits take more."""
    norms, mixer, ffn = layer.spec.norms, layer.mixer, layer.ffn
    if isinstance(x, Sum):
        x, normed = x.normed(layer.attn_norm, norms.eps, norms.offset)
        qkv = product(normed, mixer.qkv, mixer.qkv_bias)
    else:
        qkv = norm_linear(x, layer.attn_norm, norms, mixer.qkv, mixer.qkv_bias)
    mixed = attend(qkv, turn, cache, layer_index, work, heads)
    if norms.sandwich:
        mixed = product(mixed, mixer.o, mixer.o_bias)
        x = x + fused.rms_norm(mixed, layer.post_attn_norm, norms.eps, norms.offset)
        fed = feed(x, layer.ffn_norm, norms, ffn, None)
        return x + fused.rms_norm(added_up(fed), layer.post_ffn_norm, norms.eps, norms.offset)
    between = add_product(mixed, mixer.o, mixer.o_bias, x)
    if isinstance(between, Sum):
        x, normed = between.normed(layer.ffn_norm, norms.eps, norms.offset)
        hidden = gated_product(normed, ffn.gate_up, ffn.gate_up_bias, ffn.spec.activation)
        return add_product(hidden, ffn.down, ffn.down_bias, x)
    return feed(between, layer.ffn_norm, norms, ffn, between)


def write_keys(
    layer: Layer,
    heads: HeadSpec,
    x: Tensor,
    turn: tuple[Tensor | None, Tensor | None],
    cache: Tensor,
    layer_index: int,
    work: GpuWork,
) -> None:
    """The keys and values of run_layer, without the rest. x: [T, D]."""
    mixer, num_heads = layer.mixer, heads.num_heads
    weight, bias = mixer.qkv, mixer.qkv_bias
    if isinstance(weight, Tensor):  # one in few bits is not cut
        first, num_heads = num_heads * cache.shape[5], 0
        weight, bias = weight[first:], None if bias is None else bias[first:]
    qkv = norm_linear(x, layer.attn_norm, layer.spec.norms, weight, bias)
    rope_and_write(
        qkv, cache, layer_index, work.write_at, *turn, num_heads=num_heads, k_norm=heads.k_norm,
        q_norm=heads.q_norm if num_heads else None, norm_eps=heads.norm_eps, norm_offset=heads.norm_offset,
    )  # fmt: skip


def feed(x: Tensor, norm: Tensor, norms: arch.Norms, ffn: GatedFfn, residual: Tensor | None) -> Stream:
    """residual + down(act(gate) * up) of rms_norm(x). x: [T, D]; norm: f32 [D] -> [T, D]."""
    activation = ffn.spec.activation
    if isinstance(ffn.gate_up, Tensor):
        hidden = norm_gated(x, norm, norms, ffn.gate_up, ffn.gate_up_bias, activation)
        if isinstance(ffn.down, Tensor):
            return add_product(hidden, ffn.down, ffn.down_bias, residual)
        return fused_quant_linear(hidden, ffn.down, ffn.down_bias, residual)
    hidden = norm_linear(x, norm, norms, ffn.gate_up, ffn.gate_up_bias)
    if isinstance(ffn.down, Tensor):
        return add_product(fused.gated(hidden, activation), ffn.down, ffn.down_bias, residual)
    return fused_quant_linear(hidden, ffn.down, ffn.down_bias, residual, activation=activation)
