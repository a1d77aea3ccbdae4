"""Which kernel runs where: the only device branches of the JAX side.

Called by jax_models (paged_attention) and by backends/jax (cache shapes and storage). Takes arrays and plain values.
Letters: T tokens · S rows · N query heads · K KV heads · H head size · L layers of a pool · P pages of a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    cpu_attention,
    cpu_gemm,
    cpu_layer,
    cpu_linear,
    gpu_attention,
    gpu_turn,
    int8_pages,
    quant_linear,
    ranks,
    tpu_attention,
    tpu_sampling,
    tpu_stacked,
)
from pallas_kernels import paged_attention as plain
from pallas_kernels.cpu_library import library
from pallas_kernels.int8_pages import Int8Pages

Cache = int8_pages.Cache
ATTENTION: Mapping[str, Callable[..., tuple[Array, Cache]]] = {
    "plain": plain.paged_attention,
    "cpu": cpu_attention.paged_attention,
    "gpu": gpu_attention.paged_attention,
    "gpu_interpreted": partial(gpu_attention.paged_attention, interpret=True),
}
split_over = ranks.split_over
NARROW = ("fp8_e4m3", int8_pages.NAME)
"""Names of KV pages of 8 bits."""
TILE_TOKENS = 128
"""Query tokens of one prefill tile of the plain kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What attention must do in this step for the layers of one group. Rows at or after num_rows are padding.

    Row r owns tokens [query_starts[r], query_starts[r] + num_new[r]) of the step, at positions from num_computed[r] on.
    """

    kernel: str  # "plain" | "cpu" | "gpu" | "tpu"; "gpu_interpreted", "tpu_interpreted" in tests
    page_tokens: int
    num_rows: Array  # i32 []
    page_table: Array  # i32 [S, max_pages]
    query_starts: Array  # i32 [S]
    num_new: Array  # i32 [S], 0 in padding
    num_computed: Array  # i32 [S] tokens in the cache before this step
    write_page: Array  # i32 [T], 0 = the null page in padding
    write_offset: Array  # i32 [T]
    decode_order: Array  # i32 [S] rows by length
    tile_rows: Array  # i32 [tiles] row of each prefill tile
    tile_starts: Array  # i32 [tiles] first token of each prefill tile
    num_tiles: Array  # i32 []
    lists: tpu_attention.Rounds | None = None  # of the tpu kernels


def linear(x: Array, weight: quant_linear.Weight) -> Array:
    """x @ weight.T of x's dtype, rounded once. x: [M, K]; weight: [N, K]."""
    if isinstance(weight, tpu_stacked.StackedNibbles):
        return nibble_linear(x, weight, x.dtype)
    if isinstance(weight, quant_linear.QuantWeight):
        return linear_f32(x, weight).astype(x.dtype)

    def plain_linear(x: Array, weight: Array) -> Array:
        return linear_f32(x, weight).astype(x.dtype)

    if cpu_gemm.available(x, weight):
        narrow = partial(cpu_gemm.gemm, dtype=x.dtype)
        return lax.platform_dependent(x, weight, cpu=narrow, default=plain_linear)
    return plain_linear(x, weight)


def linear_f32(x: Array, weight: quant_linear.Weight, is_part: bool = False) -> Array:
    """x @ weight.T, f32 [M, N]. x: [M, K]; weight: [N, K]. is_part: x and weight are a rank's part of all inputs."""
    if isinstance(weight, quant_linear.QuantWeight):
        return quant_linear_f32(x, weight, ranks.axis() if is_part else None)
    if isinstance(weight, tpu_stacked.StackedNibbles):
        return nibble_linear(x, weight, jnp.dtype(jnp.float32))

    def plain_linear(x: Array, weight: Array) -> Array:
        # XLA:CPU is fast in bfloat16 only when it is asked for float32
        return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    if cpu_linear.available(x, weight):
        return lax.platform_dependent(x, weight, cpu=cpu_linear.linear, default=plain_linear)
    if cpu_gemm.available(x, weight):
        wide = partial(cpu_gemm.gemm, dtype=jnp.float32)
        return lax.platform_dependent(x, weight, cpu=wide, default=plain_linear)
    return plain_linear(x, weight)


def nibble_linear(x: Array, weight: tpu_stacked.StackedNibbles, dtype: jnp.dtype) -> Array:
    """x @ weight.T of `dtype`. Only a TPU keeps weights so; a CPU interprets its kernel, in tests."""
    compiled = partial(tpu_stacked.matmul, dtype=dtype)
    interpreted = partial(compiled, interpret=pltpu.InterpretParams())
    return lax.platform_dependent(x, weight, cpu=interpreted, default=compiled)


def quant_linear_f32(x: Array, weight: quant_linear.QuantWeight, axis: str | None) -> Array:
    """axis: the mesh axis over which x and weight are split."""
    if not weight.rounded:
        return widened_linear_f32(x, weight.data) * weight.scale
    if weight.rounded == "blocks":
        if axis is not None and x.shape[1] % quant_linear.BLOCK:
            raise ValueError(f"{x.shape[1]} inputs of a rank are no whole blocks of {quant_linear.BLOCK}")
        return linear_f32(quant_linear.round_blocks(x).astype(weight.data.dtype), weight.data) * weight.scale
    codes, scale = quant_linear.round_inputs(x, weight, axis)
    if weight.data.dtype == jnp.int8:
        here = partial(cpu_code_product, dtype=x.dtype)
        product = lax.platform_dependent(codes, weight.data, cpu=here, default=quant_linear.product)
        return product * scale * weight.scale
    if weight.data.dtype == jnp.float8_e4m3fn:
        return quant_linear.product(codes, weight.data) * scale * weight.scale
    return linear_f32(codes.astype(weight.data.dtype), weight.data) * scale * weight.scale


def keeps_codes(platform: str, scheme: str) -> bool:
    """Whether weights of "int8" or "fp8" stay codes of 8 bits in memory: where a product reads them so."""
    return platform == "tpu" or (platform == "cpu" and scheme == "int8" and library() is not None)


def widened_linear_f32(x: Array, data: Array) -> Array:
    """x @ data.T, f32 [M, N]. x: [M, K]; data: codes [N, K], turned into x's type on the way to the product."""

    def wide(x: Array, data: Array) -> Array:
        return linear_f32(x, data.astype(x.dtype))

    if data.dtype == jnp.int8 and cpu_linear.available(x, data):
        return lax.platform_dependent(x, data, cpu=cpu_linear.linear, default=wide)
    return wide(x, data)


def cpu_code_product(codes: Array, data: Array, dtype: jnp.dtype) -> Array:
    """codes @ data.T, f32 [M, N], multiplied as `dtype`, which holds them. codes: f32 [M, K]; data: int8 [N, K]."""
    return widened_linear_f32(codes.astype(dtype), data)


def take_split_rows(table: Array, index: Array) -> Array:
    """table[index] where each rank has a part of the table, [V / ranks, D], rows in order of ranks."""
    axis = ranks.axis()
    if axis is None:
        return take_rows(table, index)
    own = index - lax.axis_index(axis) * table.shape[0]
    inside = (own >= 0) & (own < table.shape[0])
    rows = take_rows(table, jnp.where(inside, own, 0))
    return ranks.sum_ranks(jnp.where(inside[:, None], rows, 0), table.dtype)


def take_rows(table: Array, index: Array) -> Array:
    """table[index]. table: [V, D]; index: i32 [T]."""

    def plain_take(table: Array, index: Array) -> Array:
        return table[index]

    def bits(table: Array, index: Array) -> Array:
        # XLA:CPU widens a whole bfloat16 operand of a gather to float32; bits as uint16 are left alone
        return lax.bitcast_convert_type(lax.bitcast_convert_type(table, jnp.uint16)[index], jnp.bfloat16)

    if table.dtype == jnp.bfloat16:  # elsewhere the bits would be a copy of the table
        return lax.platform_dependent(table, index, cpu=bits, default=plain_take)
    return plain_take(table, index)


def least_rows(platform: str, dtype: str) -> int:
    """Rows below which a product is padded.

    XLA:CPU multiplies a single bfloat16 row ten times slower than two. On an H200 a step of one row took 4.76 ms where
    one of eight took 4.63 (8B shape), 3.3 and 1.5 (0.6B).
    """
    if platform == "gpu":
        return 8
    return 2 if platform == "cpu" and dtype == "bfloat16" and library() is None else 1


def kernel_for(platform: str, head_size: int, kv_dtype: str) -> str:
    """The attention kernel for a cache: pages of 8 bits are a TPU's, and plain XLA's."""
    kernel = choose_kernel(platform, head_size)
    return "plain" if kv_dtype in NARROW and not kernel.startswith("tpu") else kernel


def choose_kernel(platform: str, head_size: int) -> str:
    """platform: "cpu" | "gpu" | "tpu"."""
    if platform == "tpu":
        return "tpu"
    if platform == "gpu" and gpu_attention.available(head_size):
        return "gpu"
    return "cpu" if platform == "cpu" and cpu_attention.available(head_size) else "plain"


def choose_likely(platform: str, vocab_size: int, devices: int) -> str:
    """Who drops unlikely ids before sampling, for keep_likely; "plain": the caller. Several devices have logits in
    parts, which XLA partitions and a kernel not."""
    return "tpu" if platform == "tpu" and devices == 1 and vocab_size % tpu_sampling.LANES == 0 else "plain"


def keep_likely(logits: Array, min_p: Array, top_k: Array, top_p: Array, kernel: str) -> Array:
    """logits with -inf for ids that a mask drops: min-p, then top-k, then top-p. kernel: "tpu" | "tpu_interpreted".

    logits: f32 [B, V]; the others: [B], off at 0, 0 and 1.
    """
    simulated = pltpu.InterpretParams() if kernel == "tpu_interpreted" else False
    return tpu_sampling.keep(logits, min_p, top_k, top_p, interpret=simulated)


def make_lists(work: Work, tokens: int, window: int | None) -> Work:
    """`work` with what its kernel wants made once a step. tokens: T; window: of the group's layers."""
    if work.kernel.startswith("gpu"):
        return by_token(work, tokens) if tokens <= gpu_attention.FEW_TOKENS else work
    if not work.kernel.startswith("tpu"):
        return work
    lists = tpu_attention.make_lists(
        work.page_table, work.query_starts, work.num_new, work.num_computed, tokens, window
    )
    return replace(work, lists=lists)


def by_token(work: Work, tokens: int) -> Work:
    """`work` with each of the T tokens as a row of its own: nothing is left to do in tiles."""
    each = jnp.arange(tokens)
    inside = each[:, None] - work.query_starts[None, :]
    mine = (inside >= 0) & (inside < work.num_new[None, :])
    live, row = jnp.any(mine, axis=1), jnp.argmax(mine, axis=1)
    position = work.num_computed[row] + each - work.query_starts[row]
    none = jnp.zeros((0,), jnp.int32)
    return replace(
        work,
        page_table=work.page_table[row],
        query_starts=each.astype(jnp.int32),
        num_new=live.astype(jnp.int32),
        num_computed=jnp.where(live, position, 0).astype(jnp.int32),
        tile_rows=none,
        tile_starts=none,
    )


def turns_heads(kernel: str) -> bool:
    """Whether turned_attention takes what the product of q, k and v gives. kernel: as choose_kernel said."""
    return kernel.startswith("gpu")


def turned_attention(
    qkv: Array,
    norms: tuple[Array, ...],
    turns: tuple[Array, Array] | None,
    cache: Array,
    layer_index: int,
    work: Work,
    *,
    num_heads: int,
    norm_row: int,
    eps: float,
    offset: float,
    scale: float,
    window: int | None,
    logit_cap: float | None,
) -> tuple[Array, Array]:
    """Norms of heads and rope, then as paged_attention, where turns_heads said so. -> ([T, N, H], cache).

    qkv: [T, N + 2 * K, H]; norms: none, or weights of q's and of k's, of which the row norm_row,
    [layers, H] each; turns: cos and sin, f32 [T, R / 2].
    """
    interpret = work.kernel == "gpu_interpreted"
    layer = jnp.full((1,), layer_index, jnp.int32)
    places = (jnp.array([layer_index, norm_row], jnp.int32), work.write_page, work.write_offset)
    q, cache = gpu_turn.turn_and_write(
        qkv, norms, turns, cache, places, num_heads=num_heads, eps=eps, offset=offset, interpret=interpret
    )
    out = gpu_attention.attend(
        q,
        cache,
        (layer, work.page_table, work.query_starts, work.num_new, work.num_computed),
        (work.tile_rows, work.tile_starts, work.num_tiles[None]),
        scale=scale,
        window=window,
        logit_cap=logit_cap,
        interpret=interpret,
    )
    return out, cache


def has_whole_layers(kernel: str, tokens: int, head_size: int, dtype: str) -> bool:
    """Whether decoder_layer takes steps of so many tokens. kernel: as choose_kernel said; dtype: of activations."""
    return kernel == "cpu" and cpu_layer.available(tokens, head_size, dtype)


def takes_parts(parts: Mapping[str, Array]) -> bool:
    """Whether decoder_layer takes a layer of such parts: not those whose inputs are rounded to e4m3."""
    return not cpu_layer.unknown(parts)


def cache_shape(
    kernel: str, num_layers: int, num_pages: int, page_tokens: int, num_kv_heads: int, head_size: int
) -> tuple[int, ...]:
    """[L, P, 2, K, page, H]: keys, then values, of a page; a head's tokens lie together, on a TPU a token's heads."""
    if kernel.startswith("tpu"):
        return tpu_attention.cache_shape(num_layers, num_pages, page_tokens, num_kv_heads, head_size)
    return (num_layers, num_pages, 2, num_kv_heads, page_tokens, head_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An array of a pool's cache."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    heads_axis: int  # that ranks share


def cache_arrays(
    platform: str,
    kv_dtype: str,
    *,
    num_layers: int,
    num_pages: int,
    page_tokens: int,
    num_kv_heads: int,
    head_size: int,
) -> tuple[Stored, ...]:
    """The array of a pool, or codes and scales of Int8Pages; int8_pages.joined makes the cache of them."""
    kernel = kernel_for(platform, head_size, kv_dtype)
    of_tpu = kernel.startswith("tpu")
    lies_on = "tpu" if of_tpu else platform  # the kernels of a TPU take its forms wherever they run
    shape = cache_shape(kernel, num_layers, num_pages, page_tokens, num_kv_heads, head_size)
    held = Stored(shape=shape, dtype=cache_dtype(kv_dtype, lies_on), heads_axis=4 if of_tpu else 3)
    if kv_dtype != int8_pages.NAME:
        return (held,)
    middle = (2 * num_kv_heads,) if of_tpu else (2, num_kv_heads)
    scales = Stored(
        shape=(num_layers, num_pages, *middle, page_tokens),
        dtype=cache_dtype("bfloat16", lies_on),
        heads_axis=len(middle) + 1,
    )
    return held, scales


def cache_dtype(kv_dtype: str, platform: str) -> jnp.dtype:
    """How the cache is stored: on the CPU narrow numbers lie as bits, XLA would widen the whole cache otherwise."""
    if kv_dtype == int8_pages.NAME:
        return jnp.dtype("int8")  # of codes
    if kv_dtype == "fp8_e4m3":
        return jnp.dtype("uint8" if platform == "cpu" else "float8_e4m3fn")
    return jnp.dtype("uint16" if kv_dtype == "bfloat16" and platform == "cpu" else kv_dtype)


def max_tiles(num_tokens: int, num_rows: int) -> int:
    """Most prefill tiles that a step of T tokens and S rows has: each row of more than one token ends one early."""
    return -(-num_tokens // TILE_TOKENS) + min(num_rows, max(1, num_tokens // 2))


def paged_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: Cache,
    layer_index: int,
    work: Work,
    *,
    scale: float,
    window: int | None = None,
    logit_cap: float | None = None,
) -> tuple[Array, Cache]:
    """Write this step's keys and values into the pages, then attend. -> ([T, N, H] of q's dtype, cache).

    q: [T, N, H]; k, v: [T, K, H]; cache: [L, P, 2, K, page, H], the tpu kernels' own shape, or Int8Pages; donated. A
    query at position p sees keys in (p - window, p].
    logit_cap: cap * tanh(logits / cap) before the softmax.
    """
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    if k.shape != v.shape or k.shape != (tokens, kv_heads, size) or heads % kv_heads:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not belong together")
    if work.lists is not None:
        return tpu_attention.paged_attention(
            q, k, v, cache, layer_index, work.lists, scale=scale, window=window, logit_cap=logit_cap,
            interpret=work.kernel == "tpu_interpreted",
        )  # fmt: skip
    if isinstance(cache, Int8Pages) and work.kernel != "plain":
        raise ValueError(f"Int8Pages: the {work.kernel} kernel does not take them, plain and those of a TPU do")
    shape = int8_pages.parts(cache)[0].shape
    if shape[2:] != (2, kv_heads, work.page_tokens, size):
        raise ValueError(f"cache {shape} does not hold pages of {work.page_tokens} tokens of k {k.shape}")
    return ATTENTION[work.kernel](
        q,
        k,
        v,
        cache,
        layer_index,
        page_table=work.page_table,
        query_starts=work.query_starts,
        num_new=work.num_new,
        num_computed=work.num_computed,
        num_rows=work.num_rows,
        write_page=work.write_page,
        write_offset=work.write_offset,
        decode_order=work.decode_order,
        tile_rows=work.tile_rows,
        tile_starts=work.tile_starts,
        num_tiles=work.num_tiles,
        scale=scale,
        window=window,
        logit_cap=logit_cap,
    )


def decoder_layer(
    x: Array,
    parts: Mapping[str, Array],
    cos: Array | None,
    sin: Array | None,
    cache: Array,
    layer_index: int,
    work: Work,
    *,
    num_heads: int,
    activation: str,
    eps: float,
    offset: float,
    scale: float,
    window: int | None,
    logit_cap: float | None,
) -> tuple[Array, Array]:
    """A whole layer where has_whole_layers said so: norms, products, rope, paged attention and both residuals.

    x: [T, D]; parts: name -> array, as jax_models.decoder.Layer takes them; cos, sin: f32 [T, R / 2], None without
    rope; cache: [L, P, 2, K, page, H], donated. -> ([T, D], cache).
    """
    return cpu_layer.decoder_layer(
        x,
        parts,
        cos,
        sin,
        cache,
        layer_index,
        page_table=work.page_table,
        query_starts=work.query_starts,
        num_new=work.num_new,
        num_computed=work.num_computed,
        num_rows=work.num_rows,
        write_page=work.write_page,
        write_offset=work.write_offset,
        num_heads=num_heads,
        activation=activation,
        eps=eps,
        offset=offset,
        scale=scale,
        window=window,
        logit_cap=logit_cap,
    )
