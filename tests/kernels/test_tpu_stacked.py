"""4-bit weights in stacks in Pallas's interpreter, against plain products of one layer; races looked for."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_stacked
from pallas_kernels.tpu_stacked import StackedNibbles

LAYERS = 3
F32 = jnp.dtype("float32")


def made(columns: int, groups: int, has_zeros: bool, seed: int) -> tuple[list[Any], np.ndarray]:
    """(words, scale, zeros of all layers; the numbers [L, N, K] that they stand for)."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, size=(LAYERS, columns, 128 * groups)).astype(np.uint8)
    scale = rng.uniform(0.5, 1, size=(LAYERS, columns, groups)).astype(np.float32)
    zeros = rng.integers(0, 16, size=scale.shape).astype(np.uint8) if has_zeros else np.full(scale.shape, 8, np.uint8)
    layers = [
        tpu_stacked.packed(*each, zero if has_zeros else None) for *each, zero in zip(codes, scale, zeros, strict=True)
    ]
    arrays = [jnp.asarray(np.stack(part)) for part in zip(*layers, strict=True)]
    wide = (codes.astype(np.float32) - zeros.repeat(128, axis=2)) * scale.repeat(128, axis=2)
    return [*arrays, *([] if has_zeros else [None])], wide


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    tiles=st.integers(1, 6),
    has_zeros=st.booleans(),
    layer=st.integers(0, LAYERS - 1),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    seed=st.integers(0, 99),
)
def test_any_shape(rows: int, groups: int, tiles: int, has_zeros: bool, layer: int, dtype: str, seed: int) -> None:
    (words, scale, zeros), wide = made(128 * tiles, groups, has_zeros, seed)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(rows, 128 * groups)), dtype)
    weight = StackedNibbles(words=words, scale=scale, zeros=zeros, layer=jnp.int32(layer))
    found = tpu_stacked.matmul(x, weight, dtype=F32, interpret=pltpu.InterpretParams(detect_races=True))
    assert not interpreter.races.races_found
    wanted = np.asarray(x, np.float32) @ wide[layer].T
    np.testing.assert_allclose(found, wanted, atol=2e-4 * wanted.std(), rtol=1e-4)


def test_several_steps_along_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_stacked, "INNER", 1024)
    (words, scale, zeros), wide = made(256, 16, True, 0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(20, 2048)), jnp.float32)
    weight = StackedNibbles(words=words, scale=scale, zeros=zeros, layer=jnp.int32(1))
    found = tpu_stacked.matmul(x, weight, dtype=F32, interpret=pltpu.InterpretParams(detect_races=True))
    assert not interpreter.races.races_found
    wanted = np.asarray(x) @ wide[1].T
    np.testing.assert_allclose(found, wanted, atol=2e-4 * wanted.std(), rtol=1e-4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    (words, scale, zeros), _ = made(128, 1, False, 0)
    weight = StackedNibbles(words=words, scale=scale, zeros=zeros, layer=jnp.int32(0))
    with pytest.raises(ValueError, match="must be multiples of 128"):
        tpu_stacked.matmul(jnp.zeros((16, 256), jnp.bfloat16), weight, dtype=F32)
