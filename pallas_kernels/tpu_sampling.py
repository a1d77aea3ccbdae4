"""Min-p, top-k and top-p masks of logits on a TPU without sorting: thresholds found by bisection in VMEM.

Eight rows at a time, their whole vocabulary resident (40 MiB for 262144 ids): HBM is read once and written once, and
the 32 halvings of a threshold pass over VMEM. Thresholds are bisected as integers in the order of the floats and
compared as floats, so the kept ids are those of backends/jax/sample.py (keep_likely, keep_top_k, keep_top_p, in this
order), ties included; where top-p's sum meets its bound within float32's rounding the order of additions decides. A
mask that none of the eight rows asks for is skipped. dispatch.keep_likely calls it, for logits on one device.
Written without ref.reshape
and ref.bitcast, so that it runs in Pallas's interpreter with its race detector. Letters: S rows · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, ROWS = 128, 8  # of a vector register
CHUNK = 16  # registers of one turn of a loop over the vocabulary
SPARE_BYTES = 4 << 20
INFINITY_KEY = 0x7F800000
KEYS = (-INFINITY_KEY - 1, INFINITY_KEY)  # of -inf and inf: what a threshold can be


def keep(
    logits: Array,
    min_p: Array,
    top_k: Array,
    top_p: Array,
    *,
    interpret: pltpu.InterpretParams | bool = False,
    name: str = "keep",
) -> Array:
    """logits with -inf for ids that a mask drops. logits: f32 [S, V], temperature applied, V a multiple of 128.

    min_p: f32 [S], 0 is off; top_k: i32 [S], 0 is off; top_p: f32 [S] > 0, 1 is off. A NaN stays NaN. Raises ValueError
    for another V: pad it with -inf.
    """
    rows, vocab = logits.shape
    if vocab % LANES or logits.dtype != jnp.float32:
        raise ValueError(f"logits {logits.shape} {logits.dtype}: f32 and a vocabulary of whole {LANES}s are wanted")
    wide, single = (pl.BlockSpec((ROWS, size), lambda i: (i, 0)) for size in (vocab, 1))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, ROWS),),
        in_specs=[wide, single, single, single],
        out_specs=wide,
        out_shape=jax.ShapeDtypeStruct(logits.shape, jnp.float32),
        scratch_shapes=[pltpu.VMEM((ROWS, vocab), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=5 * 4 * ROWS * vocab + SPARE_BYTES
        ),
        interpret=interpret,
        name=name,
    )(logits, min_p[:, None], top_k[:, None], top_p[:, None])


def kernel(logits: Any, min_p: Any, top_k: Any, top_p: Any, out: Any, weights: Any) -> None:
    """Eight rows: logits, out, weights [8, V]; the rest [8, 1]."""
    vocab = logits.shape[1]
    largest = over(vocab, lambda at: logits[:, at], jnp.maximum, -jnp.inf, jnp.max)
    off = jnp.full((ROWS, 1), -jnp.inf, jnp.float32)
    floor = jnp.where(min_p[...] > 0, largest + jnp.log(min_p[...]), off)

    def drop_unlikely(at: Any) -> None:
        out[:, at] = jnp.where(logits[:, at] < floor, -jnp.inf, logits[:, at])

    each(vocab, drop_unlikely)
    wanted = top_k[...]
    limits = (wanted > 0) & (wanted < vocab)

    @pl.when(jnp.max(limits.astype(jnp.float32)) > 0)
    def _() -> None:
        bound = jnp.where(limits, wanted, vocab).astype(jnp.float32)  # exact: a vocabulary is less than 2^24
        found = bisect(lambda t: over_kept(vocab, out, t, lambda at: 1.0) >= bound)

        def drop(at: Any) -> None:
            out[:, at] = jnp.where(out[:, at] < found, -jnp.inf, out[:, at])

        each(vocab, drop)

    shares = top_p[...] < 1  # not of the rows behind the end, which may hold NaN: false here, and so in a maximum

    @pl.when(jnp.max(shares.astype(jnp.float32)) > 0)
    def _() -> None:
        def weigh(at: Any) -> None:
            weights[:, at] = jnp.exp(out[:, at] - largest)

        each(vocab, weigh)
        bound = top_p[...] * over(vocab, lambda at: weights[:, at], jnp.add, 0.0, jnp.sum)
        found = bisect(lambda t: over_kept(vocab, out, t, lambda at: weights[:, at]) >= bound)
        found = jnp.where(shares, found, off)

        def drop(at: Any) -> None:
            out[:, at] = jnp.where(out[:, at] < found, -jnp.inf, out[:, at])

        each(vocab, drop)


def over_kept(vocab: Any, out: Any, threshold: Any, weight: Any) -> Any:
    """f32 [8, 1]: the sum of weights of ids that are not under the threshold."""
    wide = jnp.broadcast_to(threshold, (ROWS, LANES))

    def kept(at: Any) -> Any:
        return jnp.where(out[:, at] >= wide, weight(at), 0.0)

    return over(vocab, kept, jnp.add, 0.0, jnp.sum)


def over(
    vocab: int,
    read: Callable[[pl.Slice], Array],
    join: Callable[[Array, Array], Array],
    start: float,
    finish: Callable[..., Array],
) -> Array:
    """f32 [8, 1]: registers of the vocabulary joined lane by lane in CHUNK / 4 sums, lanes at the end."""
    lines = CHUNK // 4
    sums = tuple(jnp.full((ROWS, LANES), start, jnp.float32) for _ in range(lines))

    def add(first: Array | int, sums: tuple[Array, ...], registers: int) -> tuple[Array, ...]:
        held = list(sums)
        for register in range(registers):
            line = register % lines
            held[line] = join(held[line], read(lanes(first, register)))
        return tuple(held)

    turns, rest = divmod(vocab // LANES, CHUNK)
    sums = lax.fori_loop(0, turns, lambda turn, sums: add(turn * CHUNK, sums, CHUNK), sums)
    sums = add(turns * CHUNK, sums, rest)
    while len(sums) > 1:
        sums = tuple(join(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True))
    return finish(sums[0], axis=1, keepdims=True)


def each(vocab: int, act: Callable[[pl.Slice], None]) -> None:
    """Calls act for every register of the vocabulary."""
    turns, rest = divmod(vocab // LANES, CHUNK)

    def turn(index: Array, _: int) -> int:
        for register in range(CHUNK):
            act(lanes(index * CHUNK, register))
        return 0

    lax.fori_loop(0, turns, turn, 0)
    for register in range(rest):
        act(lanes(turns * CHUNK, register))


def lanes(first: Array | int, register: int) -> pl.Slice:
    start = (first + register) * LANES
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), LANES)


def bisect(enough: Callable[[Array], Array]) -> Array:
    """The largest threshold, f32 [8, 1], for which `enough` holds; -inf where it holds for none."""
    low, high = (jnp.full((ROWS, 1), key, jnp.int32) for key in KEYS)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        # the upper middle of the two, without overflow: (low | high) - ((low ^ high) >> 1)
        middle = (low | high) - ((low ^ high) >> 1)
        ok = enough(of_key(middle))
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    return of_key(lax.fori_loop(0, 32, halve, (low, high))[0])


def of_key(key: Array) -> Array:
    """The float32 whose place in the order of floats is `key`, an int32."""
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ jnp.int32(0x7FFFFFFF), key), jnp.float32)


def keep_reference(logits: np.ndarray, min_p: np.ndarray, top_k: np.ndarray, top_p: np.ndarray) -> np.ndarray:
    """The same with a sort a row, in numpy. The sampler's own functions are the other reference."""
    out = logits.copy()
    for row, x in enumerate(out):
        with np.errstate(divide="ignore"):
            x[x < x.max() + np.log(min_p[row])] = -np.inf
        if 0 < top_k[row] < x.size:
            x[x < np.sort(x)[-top_k[row]]] = -np.inf
        if top_p[row] < 1:
            weights = np.exp(x - x.max())
            order = np.argsort(-x)
            reached = np.cumsum(weights[order], dtype=np.float64) >= top_p[row] * weights.sum(dtype=np.float64)
            x[x < x[order[np.argmax(reached)]]] = -np.inf
    return out
