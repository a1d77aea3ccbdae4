"""Norms of heads, rope and the write into pages as one launch, on a GPU or interpreted, against the plain layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_models.layers import rms_norm, rotate
from pallas_kernels import gpu_turn
from pallas_kernels.dispatch import Work, by_token

TOKENS, HEADS, KV_HEADS, PAGE = 5, 4, 2, 16


@pytest.mark.parametrize(
    ("size", "turned", "normed", "dtype"),
    [
        (128, 128, True, "bfloat16"),
        (64, 32, False, "bfloat16"),
        (64, 0, True, "float32"),
        (32, 24, True, "float32"),
        (64, 0, False, "float32"),
    ],
)
@pytest.mark.parametrize("few", [1, 100])
def test_as_plain_layers(
    size: int, turned: int, normed: bool, dtype: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a head turned, a part of it, none; with norms, of which the third row is the layer's, and without."""
    monkeypatch.setattr(gpu_turn, "FEW_TOKENS", few)
    rng = np.random.default_rng(size + turned)

    def normal(*shape: int, dtype: str = dtype) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    qkv = normal(TOKENS, HEADS + 2 * KV_HEADS, size)
    weights = (normal(3, size), normal(3, size)) if normed else ()
    turns = (normal(TOKENS, turned // 2, dtype="float32"), normal(TOKENS, turned // 2, dtype="float32"))
    cache = jnp.zeros((2, 6, 2, KV_HEADS, PAGE, size), dtype)
    page, slot = jnp.arange(TOKENS, dtype=jnp.int32) + 1, jnp.arange(TOKENS, dtype=jnp.int32) * 3
    q, kept = gpu_turn.turn_and_write(
        qkv,
        weights,
        turns if turned else None,
        cache,
        (jnp.array([1, 2], jnp.int32), page, slot),
        num_heads=HEADS,
        eps=1e-6,
        offset=1.0,
        interpret=jax.default_backend() == "cpu",
    )
    wanted = list(jnp.split(qkv, (HEADS, HEADS + KV_HEADS), axis=1))
    for part in range(2):
        if normed:
            wanted[part] = rms_norm(wanted[part], weights[part][2], 1e-6, 1.0)
        if turned:
            wanted[part] = rotate(wanted[part], *turns)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 2e-2, "rtol": 1e-2}
    found = (q, kept[1, page, 0, :, slot], kept[1, page, 1, :, slot])
    for ours, plain in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), plain.astype(jnp.float32), **close)
    assert not kept[0].any()
    assert int((kept[1] != 0).any(axis=-1).sum()) == TOKENS * 2 * KV_HEADS


def test_what_is_not_finite_is_not_kept() -> None:
    qkv = jnp.full((1, 3, 64), jnp.nan).at[0, 2].set(jnp.inf)
    cache = jnp.ones((1, 2, 2, 1, PAGE, 64))
    places = (jnp.zeros(2, jnp.int32), jnp.array([1]), jnp.array([3]))
    q, kept = gpu_turn.turn_and_write(
        qkv, (), None, cache, places, num_heads=1, eps=0.0, offset=0.0, interpret=jax.default_backend() == "cpu"
    )
    assert bool(jnp.isnan(q).all())
    np.testing.assert_array_equal(kept, cache.at[0, 1, :, 0, 3].set(0.0))


@pytest.mark.parametrize("normed", [False, True])
def test_lowers_for_a_gpu(normed: bool) -> None:
    """With no GPU at hand: as far as Triton's own code, as one launch."""
    places = (jnp.zeros(2, jnp.int32), jnp.zeros(8, jnp.int32), jnp.zeros(8, jnp.int32))
    weights = (jnp.ones((28, 128), jnp.bfloat16), jnp.ones((28, 128), jnp.bfloat16)) if normed else ()
    turns = (jnp.ones((8, 64)), jnp.ones((8, 64)))

    def turn(qkv: jax.Array, cache: jax.Array) -> object:
        return gpu_turn.turn_and_write(qkv, weights, turns, cache, places, num_heads=16, eps=1e-6, offset=0.0)

    qkv = jax.ShapeDtypeStruct((8, 32, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((28, 100, 2, 8, 64, 128), jnp.bfloat16)
    lowered = jax.jit(turn, donate_argnums=1).trace(qkv, cache).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call") == 1


def test_tokens_as_rows() -> None:
    """Three rows of two, one and three tokens with padding behind: each token a row that sees what came before it."""
    ints = [np.array(values, np.int32) for values in ([0, 2, 3, 6], [2, 1, 3, 0], [10, 20, 30, 0])]
    starts, new, before = map(jnp.asarray, ints)
    none, table = jnp.zeros(1, jnp.int32), jnp.arange(8, dtype=jnp.int32).reshape(4, 2)
    work = Work(
        kernel="gpu", page_tokens=PAGE, num_rows=jnp.int32(3), page_table=table, query_starts=starts, num_new=new,
        num_computed=before, write_page=none, write_offset=none, decode_order=none, tile_rows=none, tile_starts=none,
        num_tiles=jnp.int32(2),
    )  # fmt: skip
    own = by_token(work, 8)
    np.testing.assert_array_equal(own.num_new, [1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(own.num_computed, [10, 11, 20, 30, 31, 32, 0, 0])
    np.testing.assert_array_equal(own.page_table[:6], table[jnp.array([0, 0, 1, 2, 2, 2])])
    np.testing.assert_array_equal(own.query_starts, np.arange(8))
    assert own.tile_rows.shape == (0,)
