"""KV pages of int8: codes of one byte, and a bfloat16 scale for every token, head and key or value.

A pool is then two arrays instead of one. Scales are made of each token alone, so a page is written as any other, a
token at a time; codes are rounded with the scale as it is kept. The tokens of a page lie next to last in codes, as in
other caches, and last in scales. Letters: T tokens · K KV heads · H head size · W = K * H · L layers · P pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

NAME = "int8_per_token_head"
"""What RunnerConfig.kv_dtype calls them."""
INT8_MAX = 127.0
SMALLEST = 1e-12  # a scale of a head of zeros: anything but 0
ROUND_UP = 1 + 2**-8  # no scale is under largest / 127 when it has become bfloat16


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Pages:
    """A cache of int8. On a TPU a token's heads lie side by side, and scales of head 0's keys, its values, head 1's ..

    elsewhere a head's tokens lie together, and on a CPU scales as bits: XLA would widen all of them otherwise.
    """

    codes: Array  # i8 [L, P, 2, K, page, H], on a TPU [L, P, 2, page, W]
    scales: Array  # bf16 or its bits as u16 [L, P, 2, K, page], on a TPU [L, P, 2 * K, page]


Cache = Array | Int8Pages


def parts(cache: Cache) -> tuple[Array, ...]:
    """(codes or numbers, scales if it has any)."""
    return (cache.codes, cache.scales) if isinstance(cache, Int8Pages) else (cache,)


def joined(arrays: tuple[Array, ...]) -> Cache:
    """What parts took apart."""
    return Int8Pages(codes=arrays[0], scales=arrays[1]) if len(arrays) == 2 else arrays[0]


def rounded(x: Array) -> tuple[Array, Array]:
    """Codes i8 [..., H] and scales bf16 [...]. x: [..., H], finite."""
    x = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), SMALLEST)
    scale = (largest * (ROUND_UP / INT8_MAX)).astype(jnp.bfloat16)
    return jnp.round(x / scale.astype(jnp.float32)).astype(jnp.int8), scale[..., 0]
