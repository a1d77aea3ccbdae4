"""Caches of 8 bits for the tests of the TPU kernels: made of numbers, and turned back into them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.int8_pages import Cache, Int8Pages
from pallas_kernels.tpu_narrow import round_tokens


def rounded(cache: jax.Array, kv_heads: int, size: int, form: str) -> Cache:
    """The cache of numbers [L, P, 2, page, W] in a form, "fp8" or "int8"."""
    if form == "fp8":
        return cache.astype(jnp.float8_e4m3fn)
    layers, pages, _, page, width = cache.shape
    empty = Int8Pages(codes=jnp.zeros(0, jnp.int8), scales=jnp.zeros(0, jnp.bfloat16))
    tokens = [cache[:, :, part].reshape(-1, kv_heads, size) for part in (0, 1)]
    k, v, scales = round_tokens(tokens[0], tokens[1], empty)
    assert scales is not None
    codes = jnp.stack([x.reshape(layers, pages, page, width) for x in (k, v)], axis=2)
    return Int8Pages(codes=codes, scales=scales.reshape(layers, pages, page, 2 * kv_heads).swapaxes(2, 3))


def numbers(cache: Cache) -> np.ndarray:
    """f32 [L, P, 2, page, W]."""
    if not isinstance(cache, Int8Pages):
        return np.array(cache, np.float32)
    layers, pages, both, page = cache.scales.shape
    scales = np.asarray(cache.scales, np.float32).reshape(layers, pages, both // 2, 2, page).transpose(0, 1, 3, 4, 2)
    return np.asarray(cache.codes, np.float32) * np.repeat(scales, cache.codes.shape[4] // (both // 2), axis=4)


def numbers_of_tokens(k: jax.Array, v: jax.Array, scales: jax.Array | None) -> tuple[np.ndarray, np.ndarray]:
    """f32 [T, W] twice, of tokens as round_tokens gives them."""
    found = [np.asarray(x, np.float32) for x in (k, v)]
    if scales is not None:
        of_heads = np.asarray(scales, np.float32)
        size = 2 * k.shape[1] // of_heads.shape[1]
        found = [x * np.repeat(of_heads[:, part::2], size, axis=1) for part, x in enumerate(found)]
    return found[0], found[1]
