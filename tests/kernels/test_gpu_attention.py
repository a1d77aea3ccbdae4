"""Decode attention of the jax backend on a GPU, or in Pallas's interpreter on a CPU, against plain XLA."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import gpu_attention, paged_attention

PAGE, KV_HEADS = 16, 2


def run(lengths: list[int], seed: int, size: int, group: int, decode: object, **limits: object) -> np.ndarray:
    """Rows of one new token behind lengths[i] - 1 others; a row of length 0 is padding."""
    rng = np.random.default_rng(seed)
    rows, columns = len(lengths), max(1, -(-max(lengths) // PAGE))
    table = rng.permutation(np.arange(1, rows * columns + 1)).reshape(rows, columns).astype(np.int32)
    held = np.array(lengths, np.int32)
    normal = [rng.normal(size=shape).astype(np.float32) for shape in (
        (rows, KV_HEADS * group, size), (rows, KV_HEADS, size), (rows, KV_HEADS, size),
        (2, rows * columns + 1, 2, KV_HEADS, PAGE, size))]  # fmt: skip
    q, k, v, cache = map(jnp.asarray, normal)
    before = np.maximum(held - 1, 0)
    zero = jnp.zeros(1, jnp.int32)
    out, _ = paged_attention.paged_attention(
        q, k, v, cache, 1,
        page_table=jnp.asarray(table), query_starts=jnp.arange(rows), num_new=jnp.asarray((held > 0).astype(np.int32)),
        num_computed=jnp.asarray(before), num_rows=jnp.int32(rows),
        write_page=jnp.asarray(np.where(held > 0, table[np.arange(rows), before // PAGE], 0)),
        write_offset=jnp.asarray(before % PAGE), decode_order=jnp.argsort(jnp.asarray(held)), tile_rows=zero,
        tile_starts=zero, num_tiles=jnp.int32(0), scale=size**-0.5, decode=decode, **limits,
    )  # fmt: skip
    return np.asarray(out)[held > 0]


def check(lengths: list[int], seed: int, size: int = 64, group: int = 4, **limits: object) -> None:
    limits = {"window": None, "logit_cap": None, **limits}
    ours = partial(gpu_attention.attend_decode, interpret=jax.default_backend() == "cpu")
    found, wanted = (run(lengths, seed, size, group, decode, **limits) for decode in (ours, None))
    # a GPU multiplies float32 in TF32: 10 bits
    np.testing.assert_allclose(found, wanted, atol=2e-5 if jax.default_backend() == "cpu" else 5e-3)


@pytest.mark.parametrize("limits", [{}, {"window": 20}, {"logit_cap": 3.0}])
def test_as_plain_xla(limits: dict[str, object]) -> None:
    check([1, 16, 17, 0, 90, 33], seed=1, **limits)


@pytest.mark.parametrize(("size", "group"), [(128, 1), (64, 3), (256, 8)])
def test_other_heads(size: int, group: int) -> None:
    check([40, 5], seed=2, size=size, group=group)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 99),
    window=st.none() | st.integers(1, 60),
)
def test_any_rows(lengths: list[int], seed: int, window: int | None) -> None:
    check(lengths, seed, window=window)


def test_more_rows_than_programs_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention, "PROGRAMS", 1)
    check([70, 3, 50], seed=3)


def test_head_sizes() -> None:
    assert [size for size in (64, 80, 96, 128, 256) if gpu_attention.available(size)] == [64, 128, 256]
