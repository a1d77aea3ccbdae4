"""Prefill attention for a TPU, in Pallas's interpreter on the CPU: against numpy, with the race detector on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_prefill
from pallas_kernels.int8_pages import Cache
from pallas_kernels.tpu_decode import LANES
from pallas_kernels.tpu_lists import prefill_tiles
from pallas_kernels.tpu_narrow import round_tokens
from pallas_kernels.tpu_prefill import BLOCK_PAGES, TILE, prefill_attention
from tests.kernels.narrow_pages import numbers, numbers_of_tokens, rounded

LAYERS, KV_HEADS, GROUP, SIZE = 2, 2, 4, 128


class Case:
    """Rows (tokens before, new tokens), one after another from token `begin` on; rows of one new token are not ours."""

    def __init__(
        self, rows: list[tuple[int, int]], seed: int, begin: int = 0, size: int = SIZE, group: int = GROUP,
        form: str = "bf16",
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        self.size, self.heads = size, KV_HEADS * group
        self.rows, starts = rows, []
        for _, new in rows:
            starts.append(begin)
            begin += new
        self.starts = starts
        self.tokens = -(-max(begin, 1) // TILE) * TILE
        counts = [-(-(before + new) // LANES) for before, new in rows]
        total, widest = sum(counts), max(counts)
        ids = iter(rng.permutation(np.arange(1, total + 1)))
        self.table = np.zeros((len(rows), widest), np.int32)
        for row, count in enumerate(counts):
            self.table[row, :count] = [next(ids) for _ in range(count)]

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

        self.q = normal(self.tokens, self.heads * size)
        self.k, self.v = normal(self.tokens, KV_HEADS * size), normal(self.tokens, KV_HEADS * size)
        self.cache: Cache = normal(LAYERS, total + 1, 2, LANES, KV_HEADS * size)
        self.new_scales: jax.Array | None = None
        if form != "bf16":
            self.cache = rounded(self.cache, KV_HEADS, size, form)
            new_tokens = (x.reshape(-1, KV_HEADS, size) for x in (self.k, self.v))
            self.k, self.v, self.new_scales = round_tokens(*new_tokens, self.cache)
        self.sinks = jnp.asarray(rng.normal(size=self.heads), jnp.float32)
        new = np.array([new if new > 1 else 0 for _, new in rows], np.int32)
        before = np.array([before for before, _ in rows], np.int32)
        self.tiles = prefill_tiles(
            jnp.asarray(self.table), jnp.asarray(starts, jnp.int32), jnp.asarray(new), jnp.asarray(before),
            self.tokens, total + len(rows) * BLOCK_PAGES,
        )  # fmt: skip

    def run(self, dma_execution_mode: str = "on_wait", **options: object) -> tuple[np.ndarray, Cache]:
        out, cache = prefill_attention(
            self.q, self.k, self.v, self.cache, jnp.array([1], jnp.int32), self.tiles, scale=self.size**-0.5,
            size=self.size, new_scales=self.new_scales, **options,
            interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma_execution_mode),
        )  # fmt: skip
        return np.asarray(out, np.float32), cache

    def wanted(
        self, window: int | None = None, logit_cap: float | None = None, sinks: jax.Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        cache, q = numbers(self.cache), np.asarray(self.q, np.float32)
        k, v = numbers_of_tokens(self.k, self.v, self.new_scales)
        out = np.zeros_like(q)
        for row, (before, new) in enumerate(self.rows):
            if new < 2:
                continue
            begin, total = self.starts[row], before + new
            for i in range(new):
                page, offset = divmod(before + i, LANES)
                cache[1, self.table[row, page], 0, offset] = k[begin + i]
                cache[1, self.table[row, page], 1, offset] = v[begin + i]
            held = np.concatenate(cache[1, self.table[row]], axis=1)[:, :total]
            keys, values = held.reshape(2, total, KV_HEADS, self.size).transpose(0, 2, 1, 3)
            queries = q[begin : begin + new].reshape(new, KV_HEADS, -1, self.size)
            scores = np.einsum("qkgh,knh->kgqn", queries, keys) * self.size**-0.5
            if logit_cap is not None:
                scores = logit_cap * np.tanh(scores / logit_cap)
            position, key = before + np.arange(new)[:, None], np.arange(total)[None]
            hidden = (key > position) | (False if window is None else key <= position - window)
            scores = np.where(hidden, -np.inf, scores)
            share = np.exp(scores - scores.max(-1, keepdims=True))
            divisor = share.sum(-1, keepdims=True)
            if sinks is not None:
                of_heads = np.asarray(sinks).reshape(KV_HEADS, -1, 1, 1)
                divisor = divisor + np.exp(of_heads - scores.max(-1, keepdims=True))
            mixed = np.einsum("kgqn,knh->qkgh", share / divisor, values)
            out[begin : begin + new] = mixed.reshape(new, -1)
        return out, cache


def check(case: Case, **options: object) -> None:
    found, wanted = case.run(**options), case.wanted(**options)  # type: ignore[arg-type]
    assert not interpreter.races.races_found
    for (_, new), begin in zip(case.rows, case.starts, strict=True):
        if new > 1:
            mine = slice(begin, begin + new)
            np.testing.assert_allclose(found[0][mine], wanted[0][mine], atol=2e-2)  # shares and outputs are bf16
    np.testing.assert_array_equal(numbers(found[1]), wanted[1])


@pytest.mark.parametrize("form", ["plain", "window", "capped", "sinks"])
def test_as_in_numpy(form: str) -> None:
    """Whole pages that begin at 16, others that do not, chunks behind a prefix, rows of one token between."""
    case = Case([(0, 1), (0, 15), (128, 256), (77, 60), (5, 1), (130, 40)], seed=3)
    options = {"plain": {}, "window": {"window": 40}, "capped": {"logit_cap": 3.0}, "sinks": {"sinks": case.sinks}}
    check(case, **options[form])


@pytest.mark.parametrize(("size", "group"), [(64, 4), (80, 1), (96, 3), (256, 2)])
def test_other_heads(size: int, group: int) -> None:
    check(Case([(130, 40), (0, 20)], seed=4, size=size, group=group))


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("size", [64, 128])
def test_pages_of_8_bits(form: str, size: int) -> None:
    """Whole pages and parts, of tokens that begin at 32 and elsewhere, behind a prefix and not."""
    check(Case([(0, 1), (0, 15), (128, 272), (77, 60), (5, 1), (130, 40)], seed=3, begin=16, size=size, form=form))


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), min_size=1, max_size=4),
    begin=st.integers(0, 40),
    seed=st.integers(0, 99),
    window=st.none() | st.integers(1, 300),
    form=st.sampled_from(["bf16", "fp8", "int8"]),
)
def test_any_rows(rows: list[tuple[int, int]], begin: int, seed: int, window: int | None, form: str) -> None:
    check(Case(rows, seed, begin, form=form), window=window)


def test_no_rows() -> None:
    case = Case([(5, 1), (0, 1)], seed=1)
    np.testing.assert_array_equal(numbers(case.run()[1]), numbers(case.cache))


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [[(0, 128)], [(0, 100)]])
def test_a_missing_wait_is_found(rows: list[tuple[int, int]], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector is awake: without the waits for copies it reports a race, of whole pages and of parts."""
    plain = pltpu.make_async_copy

    class Careless:
        def __init__(self, source, target, semaphore) -> None:  # type: ignore[no-untyped-def]
            self.start = plain(source, target, semaphore).start

        def wait(self) -> None:
            pass

    monkeypatch.setattr(tpu_prefill.pltpu, "make_async_copy", Careless)
    Case(rows, seed=2, form=form).run(dma_execution_mode="eager")
    assert interpreter.races.races_found


def test_other_shapes_are_refused() -> None:
    case = Case([(0, 20)], seed=0)
    case.cache = jnp.zeros((*case.cache.shape[:3], 64, KV_HEADS * SIZE), jnp.bfloat16)
    with pytest.raises(ValueError, match="does not fit a cache"):
        case.run()
