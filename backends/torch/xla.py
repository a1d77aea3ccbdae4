"""What torch-xla and the Pallas kernels need of each other (`--device xla`): kernels in torch's programs, caches, bits.

Attention is pallas_kernels', lowered from jax into the program that torch-xla traces (`Bridge`): the plain kernel on
PJRT's CPU, the Pallas kernels on a TPU. No TPU was there when this was written: its branch is lowered in tests, and was
never run. Called by xla_steps.py; the one file of this backend that may import jax and pallas_kernels.
Letters: T tokens · S rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from torch import Tensor
from torch_xla.core import xla_builder, xla_op_registry

from backends.torch.weights import KV_DTYPES
from backends.torch.xla_batch import Shape
from engine.errors import ConfigError
from engine.specs.cache import CacheLayout
from pallas_kernels import dispatch

ROWS = ("page_table", "query_starts", "num_new", "num_computed", "num_rows", "write_page", "write_offset")
ROWS += ("decode_order", "tile_rows", "tile_starts", "num_tiles")  # the arrays of dispatch.Work


BITS = torch.library.Library("aten", "IMPL")  # what torch-xla 2.9 does on the host, in the middle of a step
"""Holds the registration below: it ends with the object."""
float_bits = xla_op_registry.register("float_bits", lambda x: x.bitcast(xla_builder.Type.S32))


def view_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.view(dtype) for the one pair of types that a sampler wants."""
    if (x.dtype, dtype) != (torch.float32, torch.int32):
        raise NotImplementedError(f"a view of {x.dtype} as {dtype} through torch-xla")
    return float_bits(x)


BITS.impl("view_copy.dtype", view_bits, "XLA")


class Bridge:
    """jax functions as operations of torch-xla's programs, lowered once for each set of shapes.

    What torch_xla.core.xla_builder.call_jax does, for a platform that jax itself does not see: a TPU belongs to torch.
    """

    def __init__(self, platform: str, dtype: str) -> None:
        jax.config.update("jax_platforms", "cpu")
        self._platform = platform
        self._precision = "float32" if dtype == "float32" else None
        self._found: dict[Any, Callable[[list[Tensor]], list[Tensor]]] = {}

    def __call__(self, function: Callable[..., Any], tensors: Sequence[Tensor], **static: Any) -> list[Tensor]:
        """function(*arrays, **static) as jax traces it; a tuple of arrays. Tensors of 32 or fewer bits."""
        key = (function, tuple(sorted(static.items())), tuple((tuple(x.shape), x.dtype) for x in tensors))
        if key not in self._found:
            module = self.lowered(function, tensors, **static).compiler_ir("hlo").as_serialized_hlo_module_proto()
            computation = xla_builder.computation_from_module_proto(function.__name__, module)
            self._found[key] = xla_builder.xla_computation_as_func(computation, function.__name__)
        return self._found[key](list(tensors))

    def lowered(self, function: Callable[..., Any], tensors: Sequence[Tensor], **static: Any) -> Any:
        specs = [jax.ShapeDtypeStruct(x.shape, str(x.dtype).removeprefix("torch.")) for x in tensors]
        whole = jax.jit(lambda *arrays: function(*arrays, **static), keep_unused=True)
        with jax.default_matmul_precision(self._precision):
            return whole.trace(*specs).lower(lowering_platforms=(self._platform,))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    layer: jax.Array,
    *rows: jax.Array,
    kernel: str,
    page_tokens: int,
    **limits: Any,
) -> tuple[jax.Array, jax.Array]:
    """pallas_kernels.dispatch.paged_attention. layer: i32 [1]; rows: as ROWS names them; limits: scale, window, cap.

    The lists of the TPU kernels are made anew in every layer as it stands here; XLA sees that they are the same.
    """
    work = dispatch.Work(kernel=kernel, page_tokens=page_tokens, **dict(zip(ROWS, rows, strict=True)))
    work = dispatch.make_lists(work, q.shape[0], limits["window"])
    return dispatch.paged_attention(q, k, v, cache, layer[0], work, **limits)


def choose_kernels(layout: CacheLayout, platform: str) -> list[str]:
    """One a group. On a CPU the plain one: jax's C++ kernels are not known to torch-xla's client."""
    if platform == "cpu":
        return ["plain"] * len(layout.groups)
    return [dispatch.choose_kernel(platform, group.spec.head_size) for group in layout.groups]


def make_shape(tokens: int, rows: int, groups: int) -> Shape:
    """The forward program of a token bucket. rows: the largest row bucket."""
    rows = min(tokens, rows)
    return Shape(tokens, rows, groups, dispatch.max_tiles(tokens, rows), dispatch.TILE_TOKENS)


def make_caches(layout: CacheLayout, kernels: Sequence[str], device: torch.device) -> list[Tensor]:
    """One a pool. kernels: one a group. Raises ConfigError for pages that a kernel does not take."""
    caches = []
    for index, pool in enumerate(layout.pools):
        kernel = next(k for k, group in zip(kernels, layout.groups, strict=True) if group.pool == index)
        sizes = (pool.num_layers, pool.num_pages, pool.page_tokens, pool.num_kv_heads, pool.head_size)
        try:
            shape = dispatch.cache_shape(kernel, *sizes)
        except ValueError as error:
            raise ConfigError(f"--block-size: {error}") from error
        caches.append(torch.zeros(shape, dtype=KV_DTYPES[layout.kv_dtype], device=device))
    return caches
