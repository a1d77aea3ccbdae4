"""ArchSpec: everything about an architecture that is data. Parsers in families/ build it, both backends read it.

A decoder is a loop over `ArchSpec.layers` with one match on the mixer and one on the ffn. Values are numbers of the
full model, before sharding. Letters: D width, N query heads, K KV heads, H head size, F ffn width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.specs.quant import ModelQuant

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu_tanh", "gelu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding, halves convention ("rotate_half"). `specs/rope.py` turns it into frequencies.

    theta: base. rotary_size: leading dims of a head that turn (<= H).
    The other fields are those of the Hugging Face `rope_parameters` of the kind.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    rotary_size: int
    max_position: int  # the config's max_position_embeddings
    original_max_position: int | None = None
    factor: float = 1.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention over a paged cache."""

    num_heads: int  # N
    num_kv_heads: int  # K
    head_size: int  # H
    scale: float  # multiplies q . k
    rope: RopeSpec | None
    window: int | None = None  # a query at position p sees keys in (p - window, p]
    logit_cap: float | None = None  # cap * tanh(logits / cap) before the softmax
    qk_norm: bool = False  # RMSNorm over H of q and k before rope (same eps and offset as the layer's norms)
    qkv_bias: bool = False
    out_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedFfn:
    """down(act(gate(x)) * up(x))."""

    size: int  # F
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """RMSNorm placement and form: y = x / rms(x) * (weight + offset).

    sandwich False: x += mixer(norm(x)); x += ffn(norm(x)).
    sandwich True (Gemma 2, 3): a further norm after the mixer and after the ffn, before each addition.
    """

    eps: float
    offset: float = 0.0  # 1 for Gemma
    sandwich: bool = False


Mixer = Attention
Ffn = GatedFfn


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """How the family's checkpoints spell tensor names; `weights.py` makes each parameter's sources from it.

    prefixes: what may stand before "layers.0...", tried in this order.
    heads: spellings of the output head.
    fused: q, k, v are rows of one "qkv_proj" and gate, up of one "gate_up_proj" (Phi-3).
    ignored: prefixes of tensors that belong to other parts of a composite model (a vision tower).
    """

    prefixes: tuple[str, ...] = ("model.", "")
    heads: tuple[str, ...] = ("lm_head.weight",)
    fused: bool = False
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    mixer: Mixer
    ffn: Ffn
    norms: Norms


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchSpec:
    family: str  # "llama", "qwen3", "gemma2", ...
    hidden_size: int  # D
    vocab_size: int  # V: width of the embedding table and of the logits
    layers: tuple[LayerSpec, ...]
    tied_embeddings: bool
    max_position: int
    embedding_scale: float = 1.0  # Gemma: sqrt(D), rounded to the activation dtype before use
    logit_cap: float | None = None  # Gemma 2 final_logit_softcapping
    logit_scale: float = 1.0
    final_norm: Norms
    checkpoint_dtype: str  # "float32" | "bfloat16" | "float16", as config.json says
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    names: TensorNames = TensorNames()
    quant: ModelQuant | None = None  # which weights are kept in few bits, None = none

    @property
    def runs(self) -> tuple[tuple[int, tuple[LayerSpec, ...], int], ...]:
        """Layers as runs (first layer, period, repeats): equal layers, or equal patterns, one after another."""
        return find_runs(self.layers)


def find_runs(layers: tuple[LayerSpec, ...]) -> tuple[tuple[int, tuple[LayerSpec, ...], int], ...]:
    """Split `layers` greedily into (first, period, repeats), the longest coverage first, shortest period on ties."""
    runs: list[tuple[int, tuple[LayerSpec, ...], int]] = []
    at = 0
    while at < len(layers):
        best = (1, 1)  # (period length, repeats)
        for period in range(1, min(8, len(layers) - at) + 1):
            repeats = 1
            while layers[at + repeats * period : at + (repeats + 1) * period] == layers[at : at + period]:
                repeats += 1
            if (period == 1 or repeats > 1) and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        runs.append((at, layers[at : at + best[0]], best[1]))
        at += best[0] * best[1]
    return tuple(runs)
