"""The C++ attention of the CPU equals dense attention and writes the same cache as the plain kernel."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu_attention, cpu_library, dispatch
from pallas_kernels import paged_attention as plain

sys.path.insert(0, str(dispatch.__file__).rsplit("/", 1)[0] + "/csrc")
import build_cpu

ROWS = [(0, 1), (100, 1), (5, 33), (200, 70), (63, 1), (0, 130)]  # (tokens in the cache, new tokens)
PADDING = 3  # tokens and rows beyond the step's own
LAYER = 1


def make_case(
    heads: int, kv_heads: int, size: int, page: int, dtype: str
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """([q, k, v, cache], work) over randomly scattered pages."""
    rng = np.random.default_rng(heads * size)
    rows, tokens = len(ROWS) + PADDING, sum(new for _, new in ROWS) + PADDING
    columns = max(-(-(old + new) // page) for old, new in ROWS) + 1
    work = {name: np.zeros(rows, np.int32) for name in ("query_starts", "num_new", "num_computed")}
    work |= {name: np.zeros(tokens, np.int32) for name in ("write_page", "write_offset")}
    work["page_table"] = np.zeros((rows, columns), np.int32)
    free = iter(rng.permutation(rows * columns) + 1)
    tiles: list[tuple[int, int]] = []
    at = 0
    for i, (old, new) in enumerate(ROWS):
        pages = [next(free) for _ in range(-(-(old + new) // page))]
        work["page_table"][i, : len(pages)] = pages
        work["query_starts"][i], work["num_new"][i], work["num_computed"][i] = at, new, old
        positions = np.arange(old, old + new)
        work["write_page"][at : at + new] = work["page_table"][i][positions // page]
        work["write_offset"][at : at + new] = positions % page
        tiles += [(i, at + t) for t in range(0, new, dispatch.TILE_TOKENS)] if new > 1 else []
        at += new
    room = dispatch.max_tiles(tokens, rows)
    work["tile_rows"], work["tile_starts"] = np.zeros(room, np.int32), np.zeros(room, np.int32)
    work["tile_rows"][: len(tiles)], work["tile_starts"][: len(tiles)] = np.array(tiles, np.int32).T
    work["num_tiles"], work["num_rows"] = np.int32(len(tiles)), np.int32(len(ROWS))
    work["decode_order"] = np.argsort(np.where(work["num_new"] == 1, -work["num_computed"], 1)).astype(np.int32)
    shapes = [(tokens, heads, size), (tokens, kv_heads, size), (tokens, kv_heads, size)]
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    cache = jnp.asarray(rng.standard_normal((2, rows * columns + 1, 2, kv_heads, page, size)), dtype)
    if dtype == "bfloat16":
        cache = jax.lax.bitcast_convert_type(cache, jnp.uint16)
    return [*arrays, cache], {name: jnp.asarray(value) for name, value in work.items()}


def dense(arrays: list[jax.Array], work: dict[str, jax.Array], window: int | None, cap: float | None) -> np.ndarray:
    """Softmax attention of each row over all of its tokens, float32."""
    cache = arrays[3]
    if cache.dtype == jnp.uint16:
        cache = jax.lax.bitcast_convert_type(cache, jnp.bfloat16)
    q, k, v, pages = (np.asarray(a, np.float32) for a in (*arrays[:3], cache))
    table, out, page = np.asarray(work["page_table"]), np.zeros(q.shape, np.float32), pages.shape[4]
    group = q.shape[1] // k.shape[1]
    at = 0
    for i, (old, new) in enumerate(ROWS):
        key = np.arange(old + new)
        keys, values = (pages[LAYER][table[i][key // page], kv, :, key % page] for kv in (0, 1))
        keys[old:], values[old:] = k[at : at + new], v[at : at + new]
        query = np.arange(old, old + new)[:, None]
        seen = (key <= query) & (key > query - (window or 1 << 30))
        for h in range(q.shape[1]):
            scores = q[at : at + new, h] @ keys[:, h // group].T * q.shape[2] ** -0.5
            scores = np.where(seen, cap * np.tanh(scores / cap) if cap else scores, -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[at : at + new, h] = weights / weights.sum(1, keepdims=True) @ values[:, h // group]
        at += new
    return out


@pytest.mark.parametrize(("window", "cap"), [(None, None), (20, None), (None, 5.0), (70, 30.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 4, 64, 64), (4, 1, 128, 32), (8, 8, 16, 16), (16, 1, 32, 64), (2, 2, 256, 16)])
def test_equals_dense_and_writes_the_same_cache(
    shape: tuple[int, int, int, int], dtype: str, window: int | None, cap: float | None
) -> None:
    if not cpu_attention.available(shape[2]):
        pytest.fail("the prebuilt library does not load on this machine")
    arrays, work = make_case(*shape, dtype)
    tokens = sum(new for _, new in ROWS)
    expected = dense(arrays, work, window, cap)[:tokens]

    def run(kernel: object, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
        options = {"scale": shape[2] ** -0.5, "window": window, "logit_cap": cap}
        return kernel.paged_attention(*args, LAYER, **options, **work)  # type: ignore[attr-defined]

    ours, cache = jax.jit(lambda *args: run(cpu_attention, *args))(*arrays)
    _, plain_cache = jax.jit(lambda *args: run(plain, *args))(*arrays)
    error = np.abs(np.asarray(ours, np.float32)[:tokens] - expected).max()
    assert error < (1e-5 if dtype == "float32" else 2e-2)
    np.testing.assert_array_equal(np.asarray(cache)[:, 1:], np.asarray(plain_cache)[:, 1:])


def test_the_library_was_built_from_these_sources() -> None:
    assert cpu_attention.available(64)
    assert cpu_library.source_digest() == build_cpu.source_digest()


def test_the_plain_kernel_writes_into_the_pool_that_it_is_given() -> None:
    """On a CPU nothing as large as the pool lies beside it: XLA:CPU copies an operand around some scatters."""
    tokens, heads, size, page = 5, 2, 16, 8
    cache = jnp.zeros((2, 40, 2, heads, page, size), jnp.float32)
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((tokens, heads, size)).astype(np.float32) for _ in range(2))
    k[2, 0, 0] = np.nan
    pages, offsets = np.array([3, 3, 7, 39, 0], np.int32), np.array([0, 7, 2, 4, 1], np.int32)
    write = jax.jit(plain.write, donate_argnums=2).lower(k, v, cache, np.int32(1), pages, offsets).compile()
    assert write.memory_analysis().temp_size_in_bytes < cache.nbytes / 4
    wanted = np.zeros(cache.shape, np.float32)
    for token in range(tokens):
        wanted[1, pages[token], :, :, offsets[token]] = np.nan_to_num(np.stack((k[token], v[token])))
    np.testing.assert_array_equal(write(k, v, cache, np.int32(1), pages, offsets), wanted)
