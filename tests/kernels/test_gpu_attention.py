"""Attention of the jax backend on a GPU, or in Pallas's interpreter on a CPU, against plain XLA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import gpu_attention, paged_attention
from pallas_kernels.dispatch import TILE_TOKENS

PAGE, KV_HEADS = 16, 2


def run(
    rows: list[tuple[int, int]], seed: int, size: int, group: int, attend: Callable, **limits: object
) -> tuple[np.ndarray, ...]:
    """Results and cache. rows: (tokens before, new tokens), 0 new: padding."""
    rng = np.random.default_rng(seed)
    before, new = np.array(rows, np.int32).T
    columns = max(1, -(-int((before + new).max()) // PAGE))
    table = rng.permutation(np.arange(1, len(rows) * columns + 1)).reshape(-1, columns).astype(np.int32)
    starts = (np.cumsum(new) - new).astype(np.int32)
    tokens = max(1, int(new.sum()))
    row = np.repeat(np.arange(len(rows)), new)
    position = np.concatenate([np.arange(b, b + n) for b, n in rows]).astype(np.int32)
    tiles = [(r, starts[r] + t) for r in range(len(rows)) if new[r] > 1 for t in range(0, new[r], TILE_TOKENS)]
    spare = [(0, 0)] * 2
    tile_rows, tile_starts = (jnp.array(part, jnp.int32) for part in zip(*tiles, *spare, strict=True))
    normal = [rng.normal(size=shape).astype(np.float32) for shape in (
        (tokens, KV_HEADS * group, size), (tokens, KV_HEADS, size), (tokens, KV_HEADS, size),
        (2, len(rows) * columns + 1, 2, KV_HEADS, PAGE, size))]  # fmt: skip
    q, k, v, cache = map(jnp.asarray, normal)
    out, written = attend(
        q, k, v, cache, 1,
        page_table=jnp.asarray(table), query_starts=jnp.asarray(starts), num_new=jnp.asarray(new),
        num_computed=jnp.asarray(before), num_rows=jnp.int32(len(rows)),
        write_page=jnp.asarray(table[row, position // PAGE]), write_offset=jnp.asarray(position % PAGE),
        decode_order=jnp.argsort(jnp.asarray(before), stable=True), tile_rows=tile_rows, tile_starts=tile_starts,
        num_tiles=jnp.int32(len(tiles)), scale=size**-0.5, **limits,
    )  # fmt: skip
    return np.asarray(out)[: int(new.sum())], np.asarray(written)


def check(rows: list[tuple[int, int]], seed: int, size: int = 64, group: int = 4, **limits: object) -> None:
    limits = {"window": None, "logit_cap": None, **limits}
    on_cpu = jax.default_backend() == "cpu"
    ours = partial(gpu_attention.paged_attention, interpret=on_cpu)
    attends = ours, paged_attention.paged_attention
    with jax.default_matmul_precision("float32"):  # a GPU multiplies in TF32 otherwise
        found, wanted = (run(rows, seed, size, group, attend, **limits) for attend in attends)
    np.testing.assert_allclose(found[0], wanted[0], atol=2e-5)
    np.testing.assert_array_equal(found[1], wanted[1])


@pytest.mark.parametrize("limits", [{}, {"window": 20}, {"logit_cap": 3.0}])
def test_as_plain_xla(limits: dict[str, object]) -> None:
    check([(0, 1), (15, 1), (0, 40), (16, 1), (0, 0), (89, 1), (30, 150), (32, 1)], seed=1, **limits)


@pytest.mark.parametrize(("size", "group"), [(128, 1), (64, 3), (256, 8), (64, 20)])
def test_other_heads(size: int, group: int) -> None:
    check([(39, 1), (4, 20)], seed=2, size=size, group=group)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 9)), min_size=1, max_size=6).filter(
        lambda rows: any(new for _, new in rows)
    ),
    seed=st.integers(0, 99),
    window=st.none() | st.integers(1, 60),
)
def test_any_rows(rows: list[tuple[int, int]], seed: int, window: int | None) -> None:
    check(rows, seed, window=window)


def test_more_rows_than_programs_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention, "PROGRAMS", 1)
    check([(69, 1), (2, 1), (49, 1)], seed=3)


def test_what_is_not_finite_is_not_kept() -> None:
    cache, page, offset = jnp.zeros((2, 3, 2, 1, PAGE, 64)), jnp.array([2, 1]), jnp.array([5, 0])
    k = jnp.full((2, 1, 64), jnp.nan).at[1].set(7.0)
    on_cpu = jax.default_backend() == "cpu"
    written = gpu_attention.write(k, -jnp.inf * jnp.abs(k), cache, jnp.ones(1, jnp.int32), page, offset, on_cpu)
    np.testing.assert_array_equal(written, cache.at[1, 1, 0, 0, 0].set(7.0))


@pytest.mark.parametrize(("tokens", "rows", "launches"), [(1, 1, 3), (8, 8, 4), (64, 64, 3)])
def test_lowers_for_a_gpu(tokens: int, rows: int, launches: int) -> None:
    """With no GPU at hand: as far as Triton's own code. One row and few: with a join; several tokens: with tiles."""

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    heads, kv_heads, size = 32, 8, 128
    new = jax.ShapeDtypeStruct((tokens, kv_heads, size), jnp.bfloat16)
    work = {
        **{name: ints(rows) for name in ("query_starts", "num_new", "num_computed", "decode_order")},
        **{name: ints(tokens) for name in ("write_page", "write_offset")},
        **{name: ints(40) for name in ("tile_rows", "tile_starts")},
        **{name: ints() for name in ("num_rows", "num_tiles")},
        "page_table": ints(rows, 64),
    }  # fmt: skip

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: jax.Array, work: dict[str, jax.Array]) -> object:
        limits = {"scale": 0.1, "window": 100, "logit_cap": 30.0}
        return gpu_attention.paged_attention(q, k, v, cache, 3, **work, **limits)

    q = jax.ShapeDtypeStruct((tokens, heads, size), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((4, 100, 2, kv_heads, 64, size), jnp.bfloat16)
    lowered = jax.jit(attend, donate_argnums=3).trace(q, new, new, cache, work).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call") == launches


def test_what_it_takes() -> None:
    assert gpu_attention.TOKENS == TILE_TOKENS
    assert [size for size in (16, 64, 80, 96, 128, 256) if gpu_attention.available(size)] == [16, 64, 128, 256]
