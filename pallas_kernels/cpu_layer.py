"""A whole decoder layer for a few tokens on the CPU as one C++ call (csrc/cpu_layer.cc), through jax.ffi.

A decode step streams its weights once; with separate operations the threads are woken and waited for forty times a
step, and XLA works alone in between. The library is optional: without it dispatch says that no layer fits.
Letters: T tokens · D width · N query heads · K KV heads · H head size · F ffn width · R turned dims of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import cpu_attention

TARGET = "twinfer_cpu_layer"
MAX_TOKENS = 16
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")  # in the order of csrc/cpu_layer.h, as PARTS are
PARTS = (
    "attn_norm",
    "qkv",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "o",
    "o_bias",
    "post_attn_norm",
    "ffn_norm",
    "gate_up",
    "gate_up_bias",
    "down",
    "down_bias",
    "post_ffn_norm",
)
WEIGHTS = ("qkv", "o", "gate_up", "down")
SCALES = tuple(f"{name}_scale" for name in WEIGHTS)  # as csrc/cpu_layer.h: whether inputs are rounded is told apart
FIXED = tuple(f"{name}_act_scale" for name in WEIGHTS)
ROUNDED = "_int8"


def available(tokens: int, head_size: int, dtype: str) -> bool:
    """Whether the library is there and takes so many tokens and heads of this size."""
    return tokens <= MAX_TOKENS and dtype in ("float32", "bfloat16") and cpu_attention.available(head_size)


def unknown(parts: Mapping[str, Array]) -> list[str]:
    """Names that a layer of one call has no place for: weights are plain, or codes whose inputs stay or become int8."""
    return sorted(set(parts) - {*PARTS, *SCALES, *FIXED, *(name + ROUNDED for name in WEIGHTS)})


def by_slot(parts: Mapping[str, Array]) -> tuple[dict[str, Array], int]:
    """The parts under the names of PARTS, SCALES and FIXED, and a bit for each of WEIGHTS whose inputs are rounded."""
    rounded = sum(1 << index for index, name in enumerate(WEIGHTS) if name + ROUNDED in parts)
    slots = {name.removesuffix(ROUNDED) + "_scale" if name.endswith(ROUNDED) else name: parts[name] for name in parts}
    return slots, rounded


def scratch_floats(tokens: int, width: int, all_heads: int, heads: int, head_size: int, ffn: int) -> int:
    """What csrc/cpu_layer.cc takes from its scratch memory, each piece rounded up to 16."""
    sizes = (all_heads * head_size, heads * head_size, width, ffn, width)
    return sum(-(-tokens * size // 16) * 16 for size in sizes)


def decoder_layer(
    x: Array,
    parts: Mapping[str, Array],
    cos: Array | None,
    sin: Array | None,
    cache: Array,
    layer_index: int,
    *,
    page_table: Array,
    query_starts: Array,
    num_new: Array,
    num_computed: Array,
    num_rows: Array,
    write_page: Array,
    write_offset: Array,
    num_heads: int,
    activation: str,
    eps: float,
    offset: float,
    scale: float,
    window: int | None,
    logit_cap: float | None,
) -> tuple[Array, Array]:
    """x: [T, D]; cos, sin: f32 [T, R / 2] -> ([T, D], cache).

    parts: those of PARTS that the layer has, of x's dtype; a weight may be int8, its scale beside it.
    """
    tokens, width = x.shape
    kv_heads, head_size, ffn = cache.shape[3], cache.shape[5], parts["down"].shape[1]
    if unknown(parts):
        raise ValueError(f"a decoder layer has no {unknown(parts)}; it has {PARTS} and scales of {WEIGHTS}")
    if tokens > MAX_TOKENS or parts["qkv"].shape != ((num_heads + 2 * kv_heads) * head_size, width):
        raise ValueError(f"x {x.shape}, qkv {parts['qkv'].shape} and cache {cache.shape} do not belong together")
    if cos is None or sin is None:
        cos = sin = jnp.zeros((tokens, 0), jnp.float32)  # no dims turn
    slots, rounded = by_slot(parts)
    order = (*PARTS, *SCALES, *FIXED)
    given = [name for name in order if name in slots]
    present = sum(1 << order.index(name) for name in given)
    scratch = scratch_floats(tokens, width, num_heads + 2 * kv_heads, num_heads, head_size, ffn)
    call = jax.ffi.ffi_call(
        TARGET,
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
            jax.ShapeDtypeStruct((scratch,), np.float32),
        ),
        input_output_aliases={3: 1},
    )
    out, cache, _ = call(
        x,
        cos,
        sin,
        cache,
        page_table,
        query_starts,
        num_new,
        num_computed,
        num_rows.reshape(1),
        write_page,
        write_offset,
        *(slots[name] for name in given),
        present=np.int64(present),
        layer=np.int64(layer_index),
        heads=np.int64(num_heads),
        ffn=np.int64(ffn),
        rounded=np.int64(rounded),
        window=np.int64(window or 0),
        activation=np.int64(ACTIVATIONS.index(activation)),
        scale=np.float32(scale),
        logit_cap=np.float32(logit_cap or 0.0),
        eps=np.float32(eps),
        offset=np.float32(offset),
    )
    return out, cache
