"""Matrix products for a TPU in Pallas's interpreter on the CPU, against plain ones, races looked for."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_blocks, tpu_matmul
from pallas_kernels.tpu_matmul import Block

VARIANTS = ("bf16", "int8", "fp8", "fp8_wide", "w4_weights", "w4_sums")
HELD = ("bf16", "int8", "fp8", "w4")  # of the table of blocks
EXACT = ("int8",)  # sums of int32, one order of the rest


def interpret(dma_execution_mode: str = "on_wait") -> pltpu.InterpretParams:
    return pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma_execution_mode)


def run(variant: str, rows: int, inner: int, columns: int, block: Block, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Found and wanted, f32 [rows, columns]."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(rows, inner)), jnp.bfloat16)
    options = {"block": block, "interpret": interpret()}
    if variant == "bf16":
        w = jnp.asarray(rng.normal(size=(columns, inner)), jnp.bfloat16)
        found, wanted = tpu_matmul.matmul(x, w, **options), tpu_matmul.matmul_reference(x, w)
    elif variant.startswith("w4"):
        codes = rng.integers(-8, 8, size=(columns, inner))
        scale = jnp.asarray(rng.uniform(0.5, 1, size=(columns, inner // 128)), jnp.bfloat16)
        options["block"] = replace(block, scaling=variant.removeprefix("w4_"))
        found = tpu_matmul.matmul_w4a16(x, jnp.asarray(tpu_matmul.pack(codes)), scale, **options)
        wanted = tpu_matmul.matmul_w4a16_reference(x, jnp.asarray(codes), scale)
    else:
        dtype = jnp.int8 if variant == "int8" else jnp.float8_e4m3fn
        w = jnp.asarray(rng.integers(-127, 128, size=(columns, inner)), dtype)
        scale = jnp.asarray(rng.uniform(0.5, 1, size=columns), jnp.float32)
        found = tpu_matmul.matmul_w8a8(x, w, scale, wide=variant == "fp8_wide", **options)
        wanted = tpu_matmul.matmul_w8a8_reference(x, w, scale)
    return np.asarray(found, np.float32), np.asarray(wanted, np.float32)


def check(variant: str, rows: int, inner: int, columns: int, block: Block, seed: int = 0) -> None:
    found, wanted = run(variant, rows, inner, columns, block, seed)
    assert not interpreter.races.races_found
    if variant in EXACT:
        np.testing.assert_array_equal(found, wanted)
        return
    # one rounding to bf16 is 2^-9 of a number; scaled weights are rounded as well, each by itself
    spread = 2**-9 * wanted.std() if variant == "w4_weights" else 1e-4 * wanted.std()
    np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=6 * spread)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS),
    rows=st.integers(1, 70),
    steps=st.integers(1, 3),
    groups=st.integers(1, 2),
    tiles=st.integers(1, 6),
    pieces=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_any_shape(variant: str, rows: int, steps: int, groups: int, tiles: int, pieces: int, seed: int) -> None:
    """Ragged rows and columns, one and several steps along K, one and several chunks."""
    block = Block(m=32, k=128 * groups, n=128 * pieces, chunk=128)
    check(variant, rows, 128 * groups * steps, 64 * tiles, block, seed)


@pytest.mark.parametrize("columns", [72, 200])
def test_columns_that_are_no_tile(columns: int) -> None:
    check("bf16", 20, 256, columns, Block(m=32, k=128, n=128, chunk=128))


@pytest.mark.parametrize("variant", ["int8", "fp8"])
def test_rows_without_numbers(variant: str) -> None:
    """A row of zeros gives zeros; a row with an infinity gives no numbers."""
    dtype = jnp.int8 if variant == "int8" else jnp.float8_e4m3fn
    x = jnp.zeros((16, 128), jnp.bfloat16).at[1, 3].set(jnp.inf)
    w, scale = jnp.ones((128, 128), dtype), jnp.ones(128, jnp.float32)
    out = tpu_matmul.matmul_w8a8(x, w, scale, block=Block(m=16, k=128, n=128, chunk=128), interpret=interpret())
    assert not np.asarray(out[0]).any() and not np.isfinite(np.asarray(out[1], np.float32)).any()


def test_packed_weights_are_whole() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, size=(128, 128))
    words = tpu_matmul.pack(codes)
    assert words.shape == (16, 128) and words.dtype == np.int32
    whole = pl.pallas_call(
        lambda words, out: out.__setitem__(..., tpu_matmul.unpacked(words[...])),
        out_shape=jax.ShapeDtypeStruct((128, 128), jnp.bfloat16),
        interpret=interpret(),
    )(words)
    np.testing.assert_array_equal(np.asarray(whole, np.float32) - tpu_matmul.OFFSET, codes)


def test_a_seeded_race_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector is awake: an inner axis declared parallel, its steps on two cores, is reported."""
    plain = pltpu.CompilerParams
    monkeypatch.setattr(tpu_matmul.pltpu, "CompilerParams", lambda **told: plain(dimension_semantics=("parallel",) * 3))
    x, w = jnp.ones((32, 512), jnp.bfloat16), jnp.ones((128, 512), jnp.bfloat16)
    told = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    tpu_matmul.matmul(x, w, block=Block(m=32, k=128, n=128, chunk=128), interpret=told)
    assert interpreter.races.races_found


@pytest.mark.parametrize(
    ("inner", "columns", "block"),
    [
        (384, 128, Block(m=16, k=256, n=128, chunk=128)),
        (192, 128, Block(m=16, k=192, n=128, chunk=128)),
        (256, 128, Block(m=16, k=256, n=192, chunk=128)),
        (256, 100, Block(m=16, k=256, n=128, chunk=128)),
    ],
)
def test_blocks_that_do_not_fit_are_refused(inner: int, columns: int, block: Block) -> None:
    x, w = jnp.zeros((16, inner), jnp.bfloat16), jnp.zeros((columns, inner), jnp.bfloat16)
    with pytest.raises(ValueError, match="must be"):
        tpu_matmul.matmul(x, w, block=block, interpret=interpret())


def test_every_class_has_a_block_that_says_where_it_is_from() -> None:
    for generation, variants in json.loads(tpu_blocks.TABLE.read_text()).items():
        assert set(variants) == set(HELD), generation
        for classes in variants.values():
            assert all(entry["source"] in ("static", "measured") for entry in classes.values())


@pytest.mark.parametrize("generation", ["v5e", "v6e", "v5p", "tpu7x"])
@given(
    rows=st.integers(1, 9000), whole=st.integers(1, 240), columns=st.integers(1, 4000), variant=st.sampled_from(HELD)
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_looked_up_blocks_fit(generation: str, rows: int, whole: int, columns: int, variant: str) -> None:
    block = tpu_blocks.block_for(generation, variant, rows, 128 * whole, 8 * columns)
    assert (
        not whole * 128 % block.k and not block.n % block.chunk and block.m < rows + 32 and block.n < 8 * columns + 128
    )


def test_what_the_table_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="nf4 on v6e: no blocks; there are"):
        tpu_blocks.block_for("v6e", "nf4", 16, 4096, 4096)
    with pytest.raises(ValueError, match="K 100: a multiple of 128"):
        tpu_blocks.block_for("v6e", "bf16", 16, 100, 4096)
