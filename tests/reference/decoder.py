"""The executable specification of a decoder: numpy, float32, whole sequences, no cache, no batching.

It states once, in the plainest form, what an ArchSpec means. transformers is its judge (tests/models/test_reference.py)
and it is the judge of both backends. Letters as in docs/architecture.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.specs.arch import ArchSpec, Attention, LayerSpec, Norms, RopeSpec
from engine.specs.checkpoint import read_config, stream_params
from engine.specs.families import parse_config
from engine.specs.rope import frequencies
from engine.specs.weights import dummy_params, to_float32

F32 = NDArray[np.float32]
Params = Mapping[str, F32]

ERF = np.frompyfunc(math.erf, 1, 1)


def reference_params(path: Path) -> tuple[ArchSpec, dict[str, F32]]:
    """The architecture and all parameters of a checkpoint folder, by logical name."""
    arch = parse_config(read_config(path))
    return arch, {param.name: to_float32(tensor) for param, tensor in stream_params(path, arch)}


def reference_dummy(arch: ArchSpec, seed: int) -> dict[str, F32]:
    """The parameters that load_format "dummy" gives, by logical name."""
    return {param.name: to_float32(tensor) for param, tensor in dummy_params(arch, seed)}


def decode(arch: ArchSpec, params: Params, token_ids: NDArray[np.int_], max_model_len: int | None = None) -> F32:
    """Logits f32 [T, V] after each token of one sequence (token_ids [T]).

    max_model_len: the served length, which fixes dynamic and long rope; the sequence's own length when None.
    """
    length = len(token_ids) if max_model_len is None else max_model_len
    x = params["embed"][token_ids] * np.float32(arch.embedding_scale)  # [T, D]
    for index, layer in enumerate(arch.layers):
        prefix = f"layers.{index}."
        weights = {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}
        x = decoder_layer(layer, weights, x, length)
    x = rms_norm(x, params["final_norm"], arch.final_norm)
    head = params["embed"] if arch.tied_embeddings else params["head"]
    logits = x @ head.T * np.float32(arch.logit_scale)
    return soft_cap(logits, arch.logit_cap)


def decoder_layer(layer: LayerSpec, weights: Params, x: F32, max_model_len: int) -> F32:
    """x: [T, D] -> [T, D]."""
    norms = layer.norms
    mixed = attention(layer.mixer, norms, weights, rms_norm(x, weights["attn_norm"], norms), max_model_len)
    if norms.sandwich:
        mixed = rms_norm(mixed, weights["post_attn_norm"], norms)
    x = x + mixed
    out = ffn(layer, weights, rms_norm(x, weights["ffn_norm"], norms))
    if norms.sandwich:
        out = rms_norm(out, weights["post_ffn_norm"], norms)
    return x + out


def rms_norm(x: F32, weight: F32, norms: Norms) -> F32:
    """Over the last dimension of x [..., n]; weight [n]."""
    scale = 1.0 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(norms.eps))
    return x * scale * (weight + np.float32(norms.offset))


def linear(x: F32, weights: Params, name: str) -> F32:
    """x [T, in] times [out, in] transposed, plus the bias where there is one: [T, out]."""
    y = x @ weights[name].T
    return y + weights[f"{name}_bias"] if f"{name}_bias" in weights else y


def attention(mixer: Attention, norms: Norms, weights: Params, x: F32, max_model_len: int) -> F32:
    """Causal attention of a whole sequence. x: [T, D] -> [T, D]."""
    tokens, size = len(x), mixer.head_size
    q = linear(x, weights, "q").reshape(tokens, mixer.num_heads, size)  # [T, N, H]
    k = linear(x, weights, "k").reshape(tokens, mixer.num_kv_heads, size)  # [T, K, H]
    v = linear(x, weights, "v").reshape(tokens, mixer.num_kv_heads, size)  # [T, K, H]
    if mixer.qk_norm:
        q, k = rms_norm(q, weights["q_norm"], norms), rms_norm(k, weights["k_norm"], norms)
    if mixer.rope is not None:
        q, k = rotate(q, mixer.rope, max_model_len), rotate(k, mixer.rope, max_model_len)
    group = mixer.num_heads // mixer.num_kv_heads  # neighbouring query heads share a KV head
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # [T, N, H]
    scores = soft_cap(np.einsum("qnh,knh->nqk", q, k) * np.float32(mixer.scale), mixer.logit_cap)  # [N, T, T]
    probs = softmax(np.where(visible(tokens, mixer.window), scores, -np.inf))
    out = np.einsum("nqk,knh->qnh", probs, v).reshape(tokens, mixer.num_heads * size)
    return linear(out.astype(np.float32), weights, "o")


def visible(tokens: int, window: int | None) -> NDArray[np.bool_]:
    """[T, T]: query p (rows) sees keys (p - window, p]."""
    query, key = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    mask: NDArray[np.bool_] = (key <= query) & (key > query - (window or tokens + 1))
    return mask


def rotate(x: F32, rope: RopeSpec, max_model_len: int) -> F32:
    """Turn the leading rotary_size dims of each head, halves convention. x: [T, n, H]."""
    inv_freq, scale = frequencies(rope, max_model_len)
    angles = np.arange(len(x), dtype=np.float32)[:, None] * inv_freq  # [T, rotary_size / 2]
    cos, sin = (fn(angles)[:, None, :] * np.float32(scale) for fn in (np.cos, np.sin))  # [T, 1, rotary_size / 2]
    half = rope.rotary_size // 2
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1)


def soft_cap(x: F32, cap: float | None) -> F32:
    return x if cap is None else np.float32(cap) * np.tanh(x / np.float32(cap))


def softmax(x: F32) -> F32:
    """Over the last dimension."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    out: F32 = e / e.sum(axis=-1, keepdims=True)
    return out


def ffn(layer: LayerSpec, weights: Params, x: F32) -> F32:
    """down(act(gate(x)) * up(x)). x: [T, D] -> [T, D]."""
    gate, up = linear(x, weights, "gate"), linear(x, weights, "up")  # [T, F]
    return linear(activate(gate, layer.ffn.activation) * up, weights, "down")


def activate(x: F32, kind: str) -> F32:
    if kind == "silu":
        return x / (1.0 + np.exp(-x))
    if kind == "gelu_tanh":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
        return np.float32(0.5) * x * (1.0 + np.tanh(inner))
    return np.float32(0.5) * x * (1.0 + ERF(x / np.float32(math.sqrt(2))).astype(np.float32))


def log_softmax(logits: F32) -> NDArray[np.float64]:
    """Over the last dimension, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out
