"""Masks of logits for a TPU in Pallas's interpreter on the CPU: the ids that the sampler keeps, races looked for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from backends.jax import sample
from backends.jax.tables import table_shapes
from engine.opened import Use
from engine.runner import SamplerLimits
from pallas_kernels import dispatch, tpu_sampling


def of_the_sampler(logits: np.ndarray, min_p: np.ndarray, top_k: np.ndarray, top_p: np.ndarray) -> np.ndarray:
    x = sample.keep_likely(jnp.asarray(logits), jnp.asarray(min_p))
    return np.asarray(sample.keep_top_p(sample.keep_top_k(x, jnp.asarray(top_k)), jnp.asarray(top_p)))


def kept(logits: np.ndarray, min_p: np.ndarray, top_k: np.ndarray, top_p: np.ndarray) -> np.ndarray:
    found = tpu_sampling.keep(
        *map(jnp.asarray, (logits, min_p, top_k, top_p)), interpret=pltpu.InterpretParams(detect_races=True)
    )
    assert not interpreter.races.races_found
    return np.asarray(found)


@settings(max_examples=12, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0]),
            st.just(0) | st.integers(1, 3000),
            st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
        ),
        min_size=1,
        max_size=11,
    ),
    registers=st.sampled_from([1, 5, 16, 19, 33]),
    spread=st.sampled_from([0.0, 0.1, 5.0]),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_rows(rows: list[tuple[float, int, float]], registers: int, spread: float, ties: bool, seed: int) -> None:
    """Ragged rows, whole and partial turns of the loops, equal logits, masks on and off."""
    rng = np.random.default_rng(seed)
    logits = (spread * rng.normal(size=(len(rows), 128 * registers))).astype(np.float32)
    if ties:
        logits = np.round(logits)
    logits[rng.uniform(size=logits.shape) < 0.1] = -np.inf
    min_p, top_k, top_p = (np.array(column, dtype) for column, dtype in zip(zip(*rows), "fif", strict=True))
    found = kept(logits, min_p, top_k, top_p)
    np.testing.assert_array_equal(found, of_the_sampler(logits, min_p, top_k, top_p))
    np.testing.assert_array_equal(found, tpu_sampling.keep_reference(logits, min_p, top_k, top_p))


def test_what_is_not_a_number_stays() -> None:
    """Rows with NaN, with an infinity, and with nothing left are the sampler's rows too."""
    logits = np.zeros((3, 256), np.float32)
    logits[0, 7], logits[1, 9], logits[2] = np.nan, np.inf, -np.inf
    half = np.full(3, 0.5, np.float32)
    args = (logits, np.zeros(3, np.float32), np.array([3, 3, 3], np.int32), half)
    found, wanted = kept(*args), of_the_sampler(*args)
    assert np.isnan(found[0, 7])
    np.testing.assert_array_equal(found[1:], wanted[1:])


def test_zeros_of_both_signs_are_equal() -> None:
    logits = np.full((1, 128), -1, np.float32)
    logits[0, :4] = [0.0, -0.0, 0.0, -0.0]
    off, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    assert np.isfinite(kept(logits, off, np.array([1], np.int32), one)).sum() == 4


def test_a_seeded_race_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector is awake: two cores that write the same rows are reported."""
    plain = tpu_sampling.pl.BlockSpec
    monkeypatch.setattr(tpu_sampling.pl, "BlockSpec", lambda shape, _: plain(shape, lambda i: (0, 0)))
    off, one = jnp.zeros(16), jnp.ones(16)
    told = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    tpu_sampling.keep(jnp.zeros((16, 128)), off, off.astype(jnp.int32), one, interpret=told)
    assert interpreter.races.races_found


def test_a_vocabulary_of_parts_is_refused() -> None:
    one = jnp.ones(2)
    with pytest.raises(ValueError, match="a vocabulary of whole 128s"):
        tpu_sampling.keep(jnp.zeros((2, 100), jnp.float32), one, one.astype(jnp.int32), one)


@pytest.mark.parametrize("used", [Use(0), Use.TOP_K, Use.MIN_P | Use.TOP_P, Use.MIN_P | Use.TOP_K | Use.TOP_P])
def test_the_sampler_with_the_kernel(used: Use) -> None:
    """Rows of all kinds, greedy ones and a padding row among them: the ids that it draws without the kernel."""
    vocab, slots, limits = 384, 12, SamplerLimits()
    rng = np.random.default_rng(int(used))
    rows, tables = jax.tree_util.tree_map(
        lambda shape: jnp.zeros(shape.shape, shape.dtype), table_shapes(slots, vocab, (1,), limits)
    )
    off = np.arange(slots + 1) % 3 == 0
    tables = replace(
        tables,
        temperature=jnp.asarray(rng.choice([0.0, 0.7, 1.5], slots + 1), jnp.float32),
        min_p=jnp.asarray(np.where(off | (Use.MIN_P not in used), 0, 0.05), jnp.float32),
        top_k=jnp.asarray(np.where(off | (Use.TOP_K not in used), 0, 20), jnp.int32),
        top_p=jnp.asarray(np.where(off | (Use.TOP_P not in used), 1, 0.7), jnp.float32),
        seed=jnp.asarray(rng.integers(0, 2**32, (slots + 1, 2)), jnp.uint32),
    )
    logits = jnp.asarray(3 * rng.normal(size=(slots, vocab)), jnp.float32)
    order = jnp.asarray([*rng.permutation(slots)[:-1], slots], jnp.int32)
    given = logits, order, jnp.zeros((slots, vocab // 32), jnp.uint32), rows, tables, jnp.int32(used | Use.RANDOM)
    shapes = (sample.Sampled(block=slots, num_top=0, likely=likely) for likely in ("tpu_interpreted", "plain"))
    found, wanted = (jax.jit(partial(sample.pick, shape=shape))(*given) for shape in shapes)
    assert found[:-1].tolist() == wanted[:-1].tolist()  # the last row is padding


def test_who_drops_unlikely_ids() -> None:
    """Ranks have logits in parts, and a vocabulary that is no multiple of 128 has no whole registers."""
    chosen = [dispatch.choose_likely(*given) for given in (("tpu", 128256, 1), ("tpu", 128256, 8), ("tpu", 1000, 1))]
    assert chosen == ["tpu", "plain", "plain"] and dispatch.choose_likely("cpu", 128256, 1) == "plain"
