"""Norms of heads, rope and the write into pages on an NVIDIA GPU: one launch from the product of q, k and v on.

Plain XLA takes six launches for it, and three products in place of one: it cuts q, k and v apart inside the product.
Letters: T tokens · N query heads · K KV heads · H head size · R turned dims of a head · L layers · P pages of the pool.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def turn_and_write(
    qkv: Array,
    weights: tuple[Array, ...],
    turns: tuple[Array, Array] | None,
    cache: Array,
    places: tuple[Array, Array, Array],
    *,
    num_heads: int,
    eps: float,
    offset: float,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """-> (q [T, N, H] normed and turned, the cache with this step's keys, so too, and values).

    qkv: [T, N + 2 * K, H]; weights: of the norms of q and of k, [layers, H] each, or none; turns: cos and sin,
    f32 [T, R / 2], None: no rope; cache: [L, P, 2, K, page, H]; places: i32 [2], the layer in the cache and the
    weights' row, page and offset i32 [T].
    Rounded to qkv's type after the norm and after the turn, as plain code rounds. What is not finite is kept as 0.
    """
    tokens, heads, size = qkv.shape
    body = functools.partial(
        turn_kernel,
        num_heads=num_heads,
        half=0 if turns is None else turns[0].shape[1],
        normed=bool(weights),
        eps=eps,
        offset=offset,
    )
    given = (qkv, *places, *weights, *(turns or ()))
    return pl.pallas_call(
        body,
        grid=(tokens, heads),
        in_specs=[WHOLE] * (1 + len(given)),
        out_specs=(WHOLE, WHOLE),
        out_shape=(
            jax.ShapeDtypeStruct((tokens, num_heads, size), qkv.dtype),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        ),
        input_output_aliases={0: 1},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="turn_and_write",
    )(cache, *given)


def turn_kernel(_, qkv, at, page, slot, *rest, num_heads, half, normed, eps, offset):  # type: ignore[no-untyped-def]
    """One head of one token; heads are those of q, then of k, then of v. rest: weights, turns, q, cache; all whole."""
    *given, q_out, cache = rest
    size, kv_heads = qkv.shape[-1], cache.shape[3]
    token, head = pl.program_id(0), pl.program_id(1)
    dims = lax.broadcasted_iota(jnp.int32, (size,), 0)
    # the value that a dim is turned with
    partner = jnp.where(dims < half, dims + half, jnp.where(dims < 2 * half, dims - half, dims))
    x = qkv[token, head].astype(jnp.float32)
    inverse = lax.rsqrt(jnp.sum(x * x, axis=0) / size + eps)

    def scaled(x: Array, index: Array, is_query: Array) -> Array:
        gains = (weight[at[1], index].astype(jnp.float32) for weight in given[:2])
        gain = jnp.where(is_query, *gains) + offset
        return (x * inverse * gain).astype(qkv.dtype).astype(jnp.float32)

    def turned(is_query: Array) -> Array:
        y = scaled(x, dims, is_query) if normed else x
        if not half:
            return y
        other = qkv[token, head, partner].astype(jnp.float32)
        other = scaled(other, partner, is_query) if normed else other
        angle = jnp.where(dims < half, dims, jnp.where(dims < 2 * half, dims - half, 0))
        cos, sin = (part[token, angle] for part in given[-2:])
        mixed = y * cos + other * jnp.where(dims < half, -sin, sin)
        return jnp.where(dims < 2 * half, mixed, y)

    def keep(kind: int, kv_head: Array, new: Array) -> None:
        new = new.astype(qkv.dtype).astype(jnp.float32)
        # a masked key has weight 0, and 0 * NaN would reach other rows
        kept = jnp.where(jnp.abs(new) < jnp.inf, new, 0.0).astype(cache.dtype)
        cache[at[0], page[token], kind, kv_head, slot[token]] = kept

    @pl.when(head < num_heads)
    def _() -> None:
        q_out[token, head] = turned(head < num_heads).astype(q_out.dtype)

    @pl.when((head >= num_heads) & (head < num_heads + kv_heads))
    def _() -> None:
        keep(0, head - num_heads, turned(head < num_heads))

    @pl.when(head >= num_heads + kv_heads)
    def _() -> None:
        keep(1, head - num_heads - kv_heads, x)
