"""The fused decoder with one order of sums for every row, whatever else is in the step: for --batch-invariant.

Called by backends/torch/invariant.py. Products, norms and attention are those of cuda_kernels/invariant_*; rope and
cache write are the same launch for any step. Importing this needs triton. Letters: T tokens · S rows · D width ·
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cuda_kernels import fused
from cuda_kernels import invariant_linear as linear
from cuda_kernels.gpu_attention import HeadSpec
from cuda_kernels.invariant_attention import Scratch, Tiles, attention
from cuda_kernels.rope_cache import rope_and_write
from torch_models.decoder import Layer, Turns
from torch_models.fused import FusedDecoder, capped


@dataclass(frozen=True, slots=True, kw_only=True)
class InvariantWork:
    """What attention must do in this step for the layers of one group. Everything step-dependent is on the device."""

    page_table: Tensor  # i32 [max_slots + 1, max_pages]
    slots: Tensor  # i32 [S]
    lengths: Tensor  # i32 [S] keys that a row sees, this step's own included
    query_starts: Tensor  # i32 [S + 1]
    write_at: Tensor  # [T] page * page_tokens + offset of each token
    tiles: dict[int, Tiles]  # by query heads a KV head
    scratch: Scratch


class InvariantDecoder(FusedDecoder):
    def run(  # type: ignore[override]  # works of its own kind
        self,
        x: Tensor,
        turns: Turns,
        caches: list[Tensor],
        places: Sequence[tuple[int, int, int]],
        works: Sequence[InvariantWork],
    ) -> Tensor:
        """The residual stream behind the last layer, [T, D]. x: [T, D] embedded tokens; the rest as Decoder.forward."""
        for (layer, heads), (group, pool, layer_index) in zip(self.layers, places, strict=True):
            turn = turns[layer.spec.mixer.rope]
            x = self.layer(layer, heads, x, turn, caches[pool], layer_index, works[group])
        return x

    def logits(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """f32 [T, V]. x: [T, D], as run gave it; out: where to write."""
        norm = self.spec.final_norm
        return capped(linear.head(x, self.final_norm, norm.eps, norm.offset, self.head, out), self.spec)

    def layer(
        self,
        part: Layer,
        heads: HeadSpec,
        x: Tensor,
        turn: tuple[Tensor | None, Tensor | None],
        cache: Tensor,
        layer_index: int,
        work: InvariantWork,
    ) -> Tensor:
        """x: [T, D] -> [T, D]. decoder.Layer in eight launches, ten with sandwich norms."""
        norms, mixer, ffn = part.spec.norms, part.mixer, part.ffn
        qkv = linear.norm_linear(x, part.attn_norm, norms.eps, norms.offset, mixer.qkv, mixer.qkv_bias)
        mixed = self.attend(qkv, turn, cache, layer_index, work, heads)
        if norms.sandwich:
            mixed = linear.linear(mixed, mixer.o, mixer.o_bias)
            x = x + fused.rms_norm(mixed, part.post_attn_norm, norms.eps, norms.offset)
        else:
            x = linear.linear_add(mixed, mixer.o, mixer.o_bias, x)
        gated = linear.norm_gated(
            x, part.ffn_norm, norms.eps, norms.offset, ffn.gate_up, ffn.gate_up_bias, ffn.spec.activation
        )
        if norms.sandwich:
            fed = linear.linear(gated, ffn.down, ffn.down_bias)
            return x + fused.rms_norm(fed, part.post_ffn_norm, norms.eps, norms.offset)
        return linear.linear_add(gated, ffn.down, ffn.down_bias, x)

    def attend(
        self,
        qkv: Tensor,
        turn: tuple[Tensor | None, Tensor | None],
        cache: Tensor,
        layer: int,
        work: InvariantWork,
        heads: HeadSpec,
    ) -> Tensor:
        """Write this step's keys and values into the pages, then attend. qkv: [T, (N + 2K) * H] -> [T, N * H]."""
        q = rope_and_write(
            qkv, cache, layer, work.write_at, *turn, num_heads=heads.num_heads,
            q_norm=heads.q_norm, k_norm=heads.k_norm, norm_eps=heads.norm_eps, norm_offset=heads.norm_offset,
        )  # fmt: skip
        out = attention(
            q, cache, layer, work.page_table, work.slots, work.query_starts, work.lengths,
            tiles=work.tiles[heads.num_heads // cache.shape[3]], scratch=work.scratch,
            scale=heads.scale, window=heads.window, logit_cap=heads.logit_cap,
        )  # fmt: skip
        return out.view(out.shape[0], -1)
