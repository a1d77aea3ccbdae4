"""The shapes that the TPU kernels are compiled at for the static gate (tpu_static.py): name -> function, arguments.

Attention: 8 KV heads of 128, groups of 4, 64 rows, unless a name says otherwise. Imports jax: for a child process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu_attention import cache_shape, int8_pages
from pallas_kernels.tpu_decode import Blocks, decode_attention
from pallas_kernels.tpu_matmul import Block, matmul, matmul_w4a16, matmul_w8a8
from pallas_kernels.tpu_pages import copy_pages, gather_pages, scatter_pages
from pallas_kernels.tpu_prefill import Tiles, prefill_attention
from pallas_kernels.tpu_sampling import keep

Job = tuple[str, Callable[..., Any], tuple[Any, ...], tuple[int, ...]]
"""(name, function, shapes, donated)"""
SCALE = 0.088


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def halves(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def jobs(attention: dict[str, dict[str, Any]]) -> Iterator[Job]:
    """attention: variants by name, as tpu_static.SHAPES has them."""
    for name, given in attention.items():
        yield (decode if name.startswith("decode") else prefill)(name, **given)
    cache, rows = halves(2, 64, 2, 128, 1024), ints(32)
    yield "copy_pages", partial(copy_pages, name="copy_pages"), (cache, rows, rows, rows, ints(1)), (0,)
    yield "gather_pages", partial(gather_pages, name="gather_pages"), (cache, rows, ints(1)), ()
    staging = jax.eval_shape(gather_pages, cache, rows, ints(1))
    yield "scatter_pages", partial(scatter_pages, name="scatter_pages"), (cache, staging, rows, ints(1)), (0,)
    yield "keep", partial(keep, name="keep"), (floats(64, 128256), floats(64), ints(64), floats(64)), ()
    small = Block(m=128, k=512, n=512, chunk=128)
    x, scale = halves(128, 1024), floats(1024)
    codes = jax.ShapeDtypeStruct((1024, 1024), jnp.int8)
    yield "matmul", partial(matmul, block=small, name="matmul"), (x, halves(1024, 1024)), ()
    yield "matmul_w8a8", partial(matmul_w8a8, block=small, name="matmul_w8a8"), (x, codes, scale), ()
    four, whole = (x, ints(128, 1024), floats(1024, 8)), Block(m=128, k=1024, n=512, chunk=128)
    yield "matmul_w4a16", partial(matmul_w4a16, block=whole, name="matmul_w4a16"), four, ()


def pages(form: str, tokens: int, kv_heads: int, size: int) -> tuple[jax.ShapeDtypeStruct, Any, Any]:
    """(new keys or values, a cache of the form, new scales)."""
    held = {"bf16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int8": jnp.int8}[form]
    new = jax.ShapeDtypeStruct((tokens, kv_heads * size), held)
    if form == "int8":
        return new, int8_pages(2, 1024, 128, kv_heads, size), halves(tokens, 2 * kv_heads)
    return new, jax.ShapeDtypeStruct(cache_shape(2, 1024, 128, kv_heads, size), held), None


def decode(
    name: str,
    kv_heads: int = 8,
    group: int = 4,
    size: int = 128,
    sinks: bool = False,
    form: str = "bf16",
    **limits: Any,
) -> Job:
    rows, heads, listed = 64, kv_heads * group, ints(1024)
    blocks = Blocks(count=ints(1), rows=listed, pages=listed, starts=listed)
    new, cache, scales = pages(form, rows, kv_heads, size)
    told = {"sinks": floats(heads) if sinks else None, "new_scales": scales}
    shapes = [halves(rows, heads, size), new, new, cache, ints(1), blocks, ints(rows), told]

    def run(*args: Any) -> Any:
        return decode_attention(*args[:7], scale=SCALE, name=name, **args[7], **limits)

    return name, run, tuple(shapes), (3,)


def prefill(
    name: str,
    kv_heads: int = 8,
    group: int = 4,
    size: int = 128,
    sinks: bool = False,
    form: str = "bf16",
    **limits: Any,
) -> Job:
    tokens, heads = 1024, kv_heads * group
    sizes = {"num_pairs": 1, "num_writes": 1, "pages": 1024}
    tiles = Tiles(**{field.name: ints(sizes.get(field.name, 64)) for field in fields(Tiles)})
    new, cache, scales = pages(form, tokens, kv_heads, size)
    told = {"sinks": floats(heads) if sinks else None, "new_scales": scales}
    shapes = [halves(tokens, heads * size), new, new, cache, ints(1), tiles, told]

    def run(*args: Any) -> Any:
        return prefill_attention(*args[:6], scale=SCALE, size=size, name=name, **args[6], **limits)

    return name, run, tuple(shapes), (3,)
