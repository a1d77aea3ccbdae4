"""Norms of heads, rope and the write into pages on an NVIDIA GPU: one launch from the product of q, k and v on.

Plain XLA takes six launches for it, and three products in place of one: it cuts q, k and v apart inside the product.
Letters: T tokens · N query heads · K KV heads · H head size · R turned dims of a head · L layers · P pages of the pool.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

FEW_TOKENS = 64  # of a step with a program a head: 8 tokens took 1.8 us so and 2.3 us by eight heads, 256 6.5 us
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
    together = heads_together(num_heads, cache.shape[3]) if tokens > FEW_TOKENS else 1
    body = functools.partial(
        turn_kernel,
        num_heads=num_heads,
        together=together,
        half=0 if turns is None else turns[0].shape[1],
        normed=bool(weights),
        eps=eps,
        offset=offset,
    )
    given = (qkv, *places, *weights, *(turns or ()))
    return pl.pallas_call(
        body,
        grid=(tokens, heads // together),
        in_specs=[WHOLE] * (1 + len(given)),
        out_specs=(WHOLE, WHOLE),
        out_shape=(
            jax.ShapeDtypeStruct((tokens, num_heads, size), qkv.dtype),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        ),
        input_output_aliases={0: 1},
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(4, together * size // 256)), num_stages=1),
        interpret=interpret,
        name="turn_and_write",
    )(cache, *given)


def heads_together(num_heads: int, kv_heads: int) -> int:
    """Heads of one program: a power of two, all of q, of k or of v."""
    both = math.gcd(num_heads, kv_heads)
    return min(both & -both, 8)


def turn_kernel(  # type: ignore[no-untyped-def]
    _, qkv, at, page, slot, *rest, num_heads, together, half, normed, eps, offset
):  # fmt: skip
    """Some heads of one token; first those of q, then of k, then of v. rest: weights, turns, q, cache; all whole."""
    *given, q_out, cache = rest
    size, kv_heads = qkv.shape[-1], cache.shape[3]
    token, head = pl.program_id(0), pl.program_id(1) * together
    heads = pl.ds(head, together)
    dims = lax.broadcasted_iota(jnp.int32, (size,), 0)
    # the value that a dim is turned with
    partner = jnp.where(dims < half, dims + half, jnp.where(dims < 2 * half, dims - half, dims))
    x = qkv[token, heads].astype(jnp.float32)  # [together, H]
    inverse = lax.rsqrt(jnp.sum(x * x, axis=1) / size + eps)[:, None]

    def scaled(x: Array, index: Array, is_query: Array) -> Array:
        gains = (weight[at[1], index].astype(jnp.float32) for weight in given[:2])
        gain = jnp.where(is_query, *gains) + offset
        return (x * inverse * gain[None, :]).astype(qkv.dtype).astype(jnp.float32)

    def turned(is_query: Array) -> Array:
        y = scaled(x, dims, is_query) if normed else x
        if not half:
            return y
        rows = head + lax.broadcasted_iota(jnp.int32, (together, size), 0)
        other = qkv[token, rows, jnp.broadcast_to(partner[None, :], rows.shape)].astype(jnp.float32)
        other = scaled(other, partner, is_query) if normed else other
        angle = jnp.where(dims < half, dims, jnp.where(dims < 2 * half, dims - half, 0))
        cos, sin = (part[token, angle] for part in given[-2:])
        mixed = y * cos[None, :] + other * jnp.where(dims < half, -sin, sin)[None, :]
        return jnp.where((dims < 2 * half)[None, :], mixed, y)

    def keep(kind: int, first: Array, new: Array) -> None:
        new = new.astype(qkv.dtype).astype(jnp.float32)
        # a masked key has weight 0, and 0 * NaN would reach other rows
        kept = jnp.where(jnp.abs(new) < jnp.inf, new, 0.0).astype(cache.dtype)
        cache[at[0], page[token], kind, pl.ds(first, together), slot[token]] = kept

    @pl.when(head < num_heads)
    def _() -> None:
        q_out[token, heads] = turned(head < num_heads).astype(q_out.dtype)

    @pl.when((head >= num_heads) & (head < num_heads + kv_heads))
    def _() -> None:
        keep(0, head - num_heads, turned(head < num_heads))

    @pl.when(head >= num_heads + kv_heads)
    def _() -> None:
        keep(1, head - num_heads - kv_heads, x)
