"""Decode attention for a TPU, in Pallas's interpreter on the CPU: against numpy, with the race detector on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_decode
from pallas_kernels.int8_pages import Cache
from pallas_kernels.tpu_decode import LANES, Blocks, decode_attention
from pallas_kernels.tpu_narrow import round_tokens
from tests.kernels.narrow_pages import numbers, numbers_of_tokens, rounded

LAYERS, KV_HEADS, GROUP, SIZE, PAGES = 2, 2, 4, 128, 12


class Case:
    """Rows of any lengths; the list holds `spare` blocks more of each row than it needs, and entries behind its end."""

    def __init__(self, lengths: list[int], seed: int, spare: int = 0, size: int = SIZE, form: str = "bf16") -> None:
        rng = np.random.default_rng(seed)
        self.lengths, self.size = lengths, size
        counts = [-(-length // LANES) + spare if length else 0 for length in lengths]
        ids = iter(rng.permutation(np.arange(1, sum(counts) + 1)))
        self.pages = [[int(next(ids)) for _ in range(count)] for count in counts]
        flat = [(row, page, LANES * n) for row, held in enumerate(self.pages) for n, page in enumerate(held)]
        behind = [(0, 0, 0)] * 3
        rows, pages, starts = (jnp.array(column, jnp.int32) for column in zip(*flat, *behind, strict=True))
        self.blocks = Blocks(count=jnp.array([len(flat)], jnp.int32), rows=rows, pages=pages, starts=starts)

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

        self.q = normal(len(lengths), KV_HEADS * GROUP, size)
        self.k, self.v = normal(len(lengths), KV_HEADS * size), normal(len(lengths), KV_HEADS * size)
        self.cache: Cache = normal(LAYERS, max(sum(counts), PAGES) + 1, 2, LANES, KV_HEADS * size)
        self.new_scales: jax.Array | None = None
        if form != "bf16":
            self.cache = rounded(self.cache, KV_HEADS, size, form)
            new = (x.reshape(-1, KV_HEADS, size) for x in (self.k, self.v))
            self.k, self.v, self.new_scales = round_tokens(*new, self.cache)
        self.sinks = jnp.asarray(rng.normal(size=KV_HEADS * GROUP), jnp.float32)

    def run(self, dma_execution_mode: str = "on_wait", **options: object) -> tuple[np.ndarray, Cache]:
        out, cache = decode_attention(
            self.q, self.k, self.v, self.cache, jnp.array([1], jnp.int32), self.blocks,
            jnp.array(self.lengths, jnp.int32), scale=self.size**-0.5,
            new_scales=self.new_scales, **options,
            interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma_execution_mode),
        )  # fmt: skip
        return np.asarray(out, np.float32), cache

    def wanted(
        self, window: int | None = None, logit_cap: float | None = None, sinks: jax.Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The cache as numbers: codes times scales."""
        cache, q = numbers(self.cache), np.asarray(self.q, np.float32)
        k, v = numbers_of_tokens(self.k, self.v, self.new_scales)
        out = np.zeros_like(q)
        for row, length in enumerate(self.lengths):
            if not length:
                continue
            page, offset = divmod(length - 1, LANES)
            cache[1, self.pages[row][page], 0, offset] = k[row]
            cache[1, self.pages[row][page], 1, offset] = v[row]
            held = np.concatenate(cache[1, self.pages[row]], axis=1)[:, :length]
            keys, values = held.reshape(2, length, KV_HEADS, self.size).transpose(0, 2, 1, 3)
            of_heads = q[row].reshape(KV_HEADS, GROUP, self.size)
            scores = np.einsum("kgh,knh->kgn", of_heads, keys) * self.size**-0.5
            if logit_cap is not None:
                scores = logit_cap * np.tanh(scores / logit_cap)
            if window is not None:
                scores[:, :, : max(0, length - window)] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            divisor = share.sum(-1, keepdims=True)
            if sinks is not None:
                divisor += np.exp(np.asarray(sinks).reshape(KV_HEADS, GROUP, 1) - scores.max(-1, keepdims=True))
            out[row] = np.einsum("kgn,knh->kgh", share / divisor, values).reshape(q[row].shape)
        return out, cache


def check(case: Case, **options: object) -> None:
    found, wanted = case.run(**options), case.wanted(**options)  # type: ignore[arg-type]
    assert not interpreter.races.races_found
    live = [row for row, length in enumerate(case.lengths) if length]
    np.testing.assert_allclose(found[0][live], wanted[0][live], atol=1.6e-2)  # shares and outputs are rounded to bf16
    np.testing.assert_array_equal(numbers(found[1]), wanted[1])


@pytest.mark.parametrize("form", ["plain", "window", "capped", "sinks"])
def test_as_in_numpy(form: str) -> None:
    """First and last places of tiles and pages, padding rows, a list that is longer than the rows."""
    case = Case([1, 16, 17, 128, 129, 300, 0, 128], seed=3, spare=1)
    options = {"plain": {}, "window": {"window": 40}, "capped": {"logit_cap": 3.0}, "sinks": {"sinks": case.sinks}}
    check(case, **options[form])


@pytest.mark.parametrize("size", [64, 80, 96, 256])
def test_other_head_sizes(size: int) -> None:
    check(Case([130, 40], seed=4, size=size))


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("size", [64, 128])
def test_pages_of_8_bits(form: str, size: int) -> None:
    """Every place in a word, first and last of tiles and pages."""
    check(Case([1, 2, 31, 32, 33, 128, 129, 300, 0, 255], seed=5, spare=1, size=size, form=form))


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    spare=st.integers(0, 2),
    window=st.none() | st.integers(1, 300),
    form=st.sampled_from(["bf16", "fp8", "int8"]),
)
def test_any_rows(lengths: list[int], seed: int, spare: int, window: int | None, form: str) -> None:
    check(Case(lengths, seed, spare, form=form), window=window)


def test_no_rows() -> None:
    case = Case([0, 0], seed=1)
    np.testing.assert_array_equal(numbers(case.run()[1]), numbers(case.cache))


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_missing_wait_is_found(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector is awake: without the wait for a block's arrival it reports a race."""
    plain = pltpu.make_async_copy

    class Careless:
        def __init__(self, source, target, semaphore) -> None:  # type: ignore[no-untyped-def]
            self.start = plain(source, target, semaphore).start

        def wait(self) -> None:
            pass

    monkeypatch.setattr(tpu_decode.pltpu, "make_async_copy", Careless)
    Case([300], seed=2, form=form).run(dma_execution_mode="eager")
    assert interpreter.races.races_found


@pytest.mark.parametrize("pages", [64, 256])
def test_other_pages_are_refused(pages: int) -> None:
    case = Case([5], seed=0)
    case.cache = jnp.zeros((*case.cache.shape[:3], pages, KV_HEADS * SIZE), jnp.bfloat16)
    with pytest.raises(ValueError, match="pages of 128 tokens are wanted"):
        case.run()
