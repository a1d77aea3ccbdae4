"""Attention of the jax backend on a GPU, or in Pallas's interpreter on a CPU, against plain XLA."""

from __future__ import annotations

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


def run(rows: list[tuple[int, int]], seed: int, size: int, group: int, kernels: object, **limits: object) -> np.ndarray:
    """rows: (tokens before, new tokens), 0 new: padding."""
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
    out, _ = paged_attention.paged_attention(
        q, k, v, cache, 1,
        page_table=jnp.asarray(table), query_starts=jnp.asarray(starts), num_new=jnp.asarray(new),
        num_computed=jnp.asarray(before), num_rows=jnp.int32(len(rows)),
        write_page=jnp.asarray(table[row, position // PAGE]), write_offset=jnp.asarray(position % PAGE),
        decode_order=jnp.argsort(jnp.asarray(before), stable=True), tile_rows=tile_rows, tile_starts=tile_starts,
        num_tiles=jnp.int32(len(tiles)), scale=size**-0.5, kernels=kernels, **limits,
    )  # fmt: skip
    return np.asarray(out)[: int(new.sum())]


def check(rows: list[tuple[int, int]], seed: int, size: int = 64, group: int = 4, **limits: object) -> None:
    limits = {"window": None, "logit_cap": None, **limits}
    on_cpu = jax.default_backend() == "cpu"
    both = gpu_attention.attend_decode, gpu_attention.attend_tiles
    ours = tuple(partial(kernel, interpret=on_cpu) for kernel in both)
    found, wanted = (run(rows, seed, size, group, kernels, **limits) for kernels in (ours, None))
    np.testing.assert_allclose(found, wanted, atol=2e-5 if on_cpu else 5e-3)  # a GPU multiplies in TF32: 10 bits


@pytest.mark.parametrize("limits", [{}, {"window": 20}, {"logit_cap": 3.0}])
def test_as_plain_xla(limits: dict[str, object]) -> None:
    check([(0, 1), (15, 1), (0, 40), (16, 1), (0, 0), (89, 1), (30, 150), (32, 1)], seed=1, **limits)


@pytest.mark.parametrize(("size", "group"), [(128, 1), (64, 3), (256, 8)])
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


def test_what_it_takes() -> None:
    assert gpu_attention.TOKENS == TILE_TOKENS
    assert [size for size in (64, 80, 96, 128, 256) if gpu_attention.available(size)] == [64, 128, 256]
