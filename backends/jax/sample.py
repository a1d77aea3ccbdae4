"""The sampler, on the device: processors, temperature, min-p, top-k, top-p and Philox noise, without sorting.

Traced by compile.py. The order of operations is that of docs/contract.md (section Sampling), the same as in
backends/torch/sample.py. One program serves every mixture of rows: a part that no row of the step uses is skipped by a
condition on `uses`. Letters: B rows of a block · V vocabulary · W = ceil(V / 32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from backends.jax.split import AXIS
from backends.jax.tables import IN_PROMPT, Rows, Tables, advance, remember
from engine.opened import Use
from pallas_kernels import dispatch

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
SAMPLING_STREAM = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What a sampling program is compiled for.

    block: rows of one. num_top: log-probabilities of a row. likely: who drops unlikely ids, see dispatch.choose_likely.
    ranks: devices that the vocabulary is split over. mesh: theirs, None where replicas have set it.
    """

    block: int
    num_top: int
    likely: str
    ranks: int = 1
    mesh: Mesh | None = None


def pick(logits: Array, slots: Array, mask: Array, rows: Rows, tables: Tables, uses: Array, shape: Sampled) -> Array:
    """Token ids i32 [B]. logits: f32 [B, V]; slots: i32 [B]; mask: u32 [B, W]; uses: i32 [] of Use bits."""

    def used(use: Use) -> Array:
        return uses & int(use) != 0

    def process(x: Array) -> Array:
        x = lax.cond(used(Use.MASK), lambda x: allow(x, mask, shape), lambda x: x, x)
        x = lax.cond(used(Use.ALLOWED), lambda x: allow_listed(x, slots, tables, shape), lambda x: x, x)
        x = lax.cond(used(Use.BAD_WORDS), lambda x: ban_words(x, slots, tables), lambda x: x, x)
        x = lax.cond(used(Use.MIN_TOKENS), lambda x: ban_stops(x, slots, rows, tables), lambda x: x, x)
        x = lax.cond(used(Use.BIAS), lambda x: add_bias(x, slots, tables), lambda x: x, x)
        return lax.cond(used(Use.PENALTIES), lambda x: penalise(x, slots, tables), lambda x: x, x)

    def drop_unlikely(x: Array) -> Array:
        limits = tables.min_p[slots], tables.top_k[slots], tables.top_p[slots]
        if shape.likely != "plain":
            any_use = used(Use.MIN_P | Use.TOP_K | Use.TOP_P)
            return lax.cond(any_use, lambda x: dispatch.keep_likely(x, *limits, shape.likely), lambda x: x, x)
        x = lax.cond(used(Use.MIN_P), lambda x: keep_likely(x, limits[0]), lambda x: x, x)
        x = lax.cond(used(Use.TOP_K), lambda x: keep_top_k(x, limits[1]), lambda x: x, x)
        return lax.cond(used(Use.TOP_P), lambda x: keep_top_p(x, limits[2]), lambda x: x, x)

    def draw(x: Array) -> Array:
        temperature = tables.temperature[slots][:, None]
        warm = x / jnp.where(temperature > 0, temperature, 1.0)
        warm = drop_unlikely(warm)
        noise = gumbel(tables.seed[slots], rows.num_outputs[slots], x.shape[1])
        return jnp.where(temperature > 0, warm + noise, x)

    processors = Use.MASK | Use.ALLOWED | Use.BAD_WORDS | Use.MIN_TOKENS | Use.BIAS | Use.PENALTIES
    x = lax.cond(used(processors), process, lambda x: x, logits)
    x = lax.cond(used(Use.RANDOM), draw, lambda x: x, x)
    return argmax(x)


def argmax(x: Array) -> Array:
    """The first index of the largest value, i32 [B]; index 0 where a row holds NaN. x: f32 [B, V]."""
    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    first = jnp.min(jnp.where(x == jnp.max(x, axis=1, keepdims=True), ids, x.shape[1]), axis=1)
    return jnp.where(first < x.shape[1], first, 0)


def likeliest(x: Array) -> tuple[Array, Array]:
    """argmax(x), and bool [B]: not all of the row is finite or -inf. x: f32 [B, V]."""

    def plain(x: Array) -> tuple[Array, Array]:
        return argmax(x), ~jnp.all(x < jnp.inf, axis=1)  # NaN is not less either

    return lax.platform_dependent(x, cuda=likeliest_in_one_pass, default=plain)


def likeliest_in_one_pass(x: Array) -> tuple[Array, Array]:
    """As likeliest, as one reduction: XLA reads x three times on a GPU otherwise."""
    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    faults = jnp.where(x < jnp.inf, 0, jnp.where(jnp.isnan(x), 2, 1))

    def better(one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
        (top, at, fault), (value, place, worse) = one, other
        wins = (value > top) | ((value == top) & (place < at))
        return jnp.where(wins, value, top), jnp.where(wins, place, at), jnp.maximum(fault, worse)

    least = (jnp.float32(-jnp.inf), jnp.int32(x.shape[1]), jnp.int32(0))
    _, first, fault = lax.reduce((x, ids, faults), least, better, (1,))
    return jnp.where((fault == 2) | (first == x.shape[1]), 0, first), fault > 0


def allow(x: Array, mask: Array, shape: Sampled) -> Array:
    """Drop ids whose bit is not set. x: f32 [B, V]; mask: u32 [B, W]."""
    if shape.ranks == 1:
        bits = bits_of(mask)
    else:
        # each rank the bits of its ids: left to XLA, all of them move where W is not divided by the ranks
        own = partial(own_bits, width=-(-x.shape[1] // shape.ranks), ranks=shape.ranks)
        spec = PartitionSpec(None, AXIS)
        bits = jax.shard_map(
            own, mesh=shape.mesh, in_specs=PartitionSpec(), out_specs=spec, axis_names={AXIS}, check_vma=False
        )(mask)
    return jnp.where(bits[:, : x.shape[1]] == 1, x, -jnp.inf)


def bits_of(words: Array) -> Array:
    """u32 [B, n] -> [B, 32 n] of 0 and 1, the lowest bit of a word first."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
    return bits.reshape(words.shape[0], -1)


def own_bits(words: Array, *, width: int, ranks: int) -> Array:
    """This rank's `width` of bits_of(words), which may begin within a word. -> u32 [B, width]."""
    first = lax.axis_index(AXIS) * width
    count = -(-width // 32)
    words = jnp.pad(words, ((0, 0), (0, width * ranks // 32 + 2 + count - words.shape[1])))  # the last rank's ids
    words = lax.dynamic_slice_in_dim(words, first // 32, count + 1, 1)
    shift = (first % 32).astype(jnp.uint32)
    # by 1 and by 31 - shift: a shift by 32 is nobody's
    words = (words[:, :-1] >> shift) | ((words[:, 1:] << 1) << (31 - shift))
    return bits_of(words)[:, :width]


def allow_listed(x: Array, slots: Array, tables: Tables, shape: Sampled) -> Array:
    listed = allow(x, tables.allowed[slots], shape)
    return jnp.where(tables.has_allowed[slots][:, None] != 0, listed, x)


def ban_words(x: Array, slots: Array, tables: Tables) -> Array:
    """Drop the last id of each bad word whose first ids were just generated."""
    prefix, last = tables.bad_prefix[slots], tables.bad_last[slots]  # [B, words, len - 1], [B, words]
    matches = jnp.all((prefix == -1) | (prefix == tables.tail[slots][:, None, :]), axis=2) & (last >= 0)
    return drop(x, jnp.where(matches, last, -1))


def drop(x: Array, ids: Array) -> Array:
    """Drop the named ids. ids: i32 [B, n], -1 = none."""
    target = jnp.where(ids >= 0, ids, x.shape[1])  # out of bounds: ignored
    return x.at[jnp.arange(x.shape[0])[:, None], target].set(-jnp.inf, mode="drop")


def ban_stops(x: Array, slots: Array, rows: Rows, tables: Tables) -> Array:
    early = rows.num_outputs[slots] < tables.min_tokens[slots]
    return drop(x, jnp.where(early[:, None], tables.stop_ids[slots], -1))


def add_bias(x: Array, slots: Array, tables: Tables) -> Array:
    ids = tables.bias_ids[slots]
    target = jnp.where(ids >= 0, ids, x.shape[1])
    return x.at[jnp.arange(x.shape[0])[:, None], target].add(tables.bias_values[slots], mode="drop")


def penalise(x: Array, slots: Array, tables: Tables) -> Array:
    """Repetition over prompt and output ids, then frequency and presence over output ids."""
    counts = tables.counts[slots]  # [B, V]
    outputs = (counts & (IN_PROMPT - 1)).astype(jnp.float32)
    factor = tables.repetition[slots][:, None]
    x = jnp.where(counts != 0, jnp.where(x > 0, x / factor, x * factor), x)
    x = x - tables.frequency[slots][:, None] * outputs
    return x - tables.presence[slots][:, None] * (outputs > 0)


def keep_likely(x: Array, min_p: Array) -> Array:
    """Drop ids whose probability is under min_p times the largest. min_p: f32 [B], 0 = off."""
    floor = jnp.max(x, axis=1) + jnp.log(min_p)  # log 0 = -inf keeps all
    return jnp.where(x < floor[:, None], -jnp.inf, x)


def keep_top_k(x: Array, top_k: Array) -> Array:
    """Keep the top_k largest, ties at the threshold included. top_k: i32 [B], 0 = off."""
    keys = sortable(x)
    vocab = x.shape[1]
    wanted = jnp.where((top_k > 0) & (top_k < vocab), top_k, vocab)

    def enough(threshold: Array) -> Array:
        return jnp.sum(keys >= threshold[:, None], axis=1) >= wanted

    return jnp.where(keys < bisect(enough, x.shape[0])[:, None], -jnp.inf, x)


def keep_top_p(x: Array, top_p: Array) -> Array:
    """Keep the smallest set of likeliest ids whose sum reaches top_p, ties included. top_p: f32 [B], 1 = off."""
    keys = sortable(x)
    weights = jnp.exp(x - jnp.max(x, axis=1, keepdims=True))
    wanted = top_p * jnp.sum(weights, axis=1)

    def enough(threshold: Array) -> Array:
        return jnp.sum(jnp.where(keys >= threshold[:, None], weights, 0.0), axis=1) >= wanted

    kept = jnp.where(keys < bisect(enough, x.shape[0])[:, None], -jnp.inf, x)
    return jnp.where(top_p[:, None] < 1, kept, x)


def sortable(x: Array) -> Array:
    """int32 keys in the order of the floats."""
    x = jnp.where(x == 0, 0.0, x)  # -0 and 0 are equal; adding 0 would be simplified away
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def bisect(enough: Callable[[Array], Array], rows: int) -> Array:
    """The largest int32 threshold a row for which `enough` holds; it holds for the smallest int32. -> i32 [B]."""
    low = jnp.full((rows,), jnp.iinfo(jnp.int32).min, jnp.int32)
    high = jnp.full((rows,), jnp.iinfo(jnp.int32).max, jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        # the upper middle of the two, without overflow: (low | high) - ((low ^ high) >> 1)
        middle = (low | high) - ((low ^ high) >> 1)
        ok = enough(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    return lax.fori_loop(0, 32, halve, (low, high))[0]


def gumbel(seed: Array, output_idx: Array, vocab_size: int) -> Array:
    """f32 [B, V] standard Gumbel noise of row i's output number output_idx[i]. seed: u32 [B, 2], low word first."""
    draw = partial(draw_words, vocab_size=vocab_size), partial(draw_each, vocab_size=vocab_size)
    bits = lax.platform_dependent(seed, output_idx.astype(jnp.uint32), cpu=draw[0], cuda=draw[0], default=draw[1])
    # 23 bits: with 24 the largest draw would round to u == 1 and its noise to infinity
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)
    return -jnp.log(-jnp.log(uniform))


def draw_words(seed: Array, output_idx: Array, *, vocab_size: int) -> Array:
    """u32 [B, V]: id v takes word v % 4 of block v // 4. seed: u32 [B, 2]; output_idx: u32 [B]."""
    blocks = jnp.arange(-(-vocab_size // 4), dtype=jnp.uint32)[None, :]
    words = jnp.stack(random_words(seed, output_idx, blocks), axis=-1)
    return words.reshape(seed.shape[0], -1)[:, :vocab_size]


def draw_each(seed: Array, output_idx: Array, *, vocab_size: int) -> Array:
    """The same, each id for itself: a TPU takes four times the numbers sooner than it weaves words into lanes."""
    ids = jnp.arange(vocab_size, dtype=jnp.uint32)[None, :]
    first, second, third, fourth = random_words(seed, output_idx, ids >> 2)
    word = ids & 3
    return jnp.where(word == 0, first, jnp.where(word == 1, second, jnp.where(word == 2, third, fourth)))


def random_words(seed: Array, output_idx: Array, blocks: Array) -> tuple[Array, ...]:
    """Four u32 [B, n] of Philox blocks. blocks: u32 [1, n]."""
    shape = (seed.shape[0], blocks.shape[1])
    counter = (
        jnp.broadcast_to(output_idx[:, None], shape),
        jnp.broadcast_to(blocks, shape),
        jnp.full(shape, SAMPLING_STREAM, jnp.uint32),
        jnp.zeros(shape, jnp.uint32),
    )
    return philox(counter, (seed[:, :1], seed[:, 1:]))


def philox(counter: tuple[Array, ...], key: tuple[Array, Array]) -> tuple[Array, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011). counter: four u32 words of one shape; key: two u32 words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(10):
        if turn:
            k0, k1 = k0 + jnp.uint32(PHILOX_W0), k1 + jnp.uint32(PHILOX_W1)
        high0, low0 = multiply(PHILOX_M0, c0)
        high1, low1 = multiply(PHILOX_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def multiply(factor: int, x: Array) -> tuple[Array, Array]:
    """High and low words of a 32 x 32 bit product, from 16-bit halves: there are no 64-bit integers here."""
    a_high, a_low = jnp.uint32(factor >> 16), jnp.uint32(factor & 0xFFFF)
    x_high, x_low = x >> 16, x & jnp.uint32(0xFFFF)
    low = a_low * x_low
    cross = a_high * x_low + (low >> 16)  # < 2^32
    cross_low = a_low * x_high + (cross & jnp.uint32(0xFFFF))
    high = a_high * x_high + (cross >> 16) + (cross_low >> 16)
    return high, jnp.uint32(factor) * x


def score(logits: Array, targets: Array, num_top: int) -> tuple[Array, Array, Array, Array]:
    """Raw log-probabilities: of the targets f32 [B], their ranks i32 [B] from 1, and the top i32, f32 [B, num_top]."""
    shift = jnp.max(logits, axis=1, keepdims=True)
    norm = shift + jnp.log(jnp.sum(jnp.exp(logits - shift), axis=1, keepdims=True))
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)
    rank = 1 + jnp.sum(logits > chosen, axis=1, dtype=jnp.int32)
    if num_top == 0:
        none = jnp.zeros((logits.shape[0], 0), jnp.float32)
        return (chosen - norm)[:, 0], rank, none.astype(jnp.int32), none
    top, ids = lax.top_k(logits, num_top)
    return (chosen - norm)[:, 0], rank, ids.astype(jnp.int32), top - norm


def sampling(
    logits: Array,
    rows: Rows,
    tables: Tables,
    packed: Array,
    mask: Array,
    *,
    shape: Sampled,
) -> tuple[Rows, Tables, Array, tuple[Array, Array, Array, Array]]:
    """The sampling program: -> (rows, tables, ids i32 [S], raw log-probabilities as `score` gives them).

    logits: f32 [S, V]; packed: i32 [2 + S] Use bits, number of sampling rows, their slots; mask: u32 [S, W].
    Rows are taken `block` at a time, so that padding costs no more than a block.
    """
    uses, num_logits, slots = packed[0], packed[1], packed[2:]
    size = logits.shape[0]
    block, num_top = min(shape.block, size), shape.num_top

    def run(first: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
        part = lax.dynamic_slice_in_dim(logits, first, block)
        ids = pick(
            part,
            lax.dynamic_slice_in_dim(slots, first, block),
            lax.dynamic_slice_in_dim(mask, first, block),
            rows,
            tables,
            uses,
            shape,
        )
        empty = empty_scores(block, num_top)
        scores = lax.cond(uses & int(Use.LOGPROBS) != 0, lambda: score(part, ids, num_top), lambda: empty)
        return ids, scores

    def step(index: Array, done: tuple[Array, tuple[Array, ...]]) -> tuple[Array, tuple[Array, ...]]:
        parts = run(index * block)
        return jax.tree_util.tree_map(
            lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, index * block, 0), done, parts
        )

    if size % block:
        raise ValueError(f"{size} rows are not whole blocks of {block}")
    empty = (jnp.zeros(size, jnp.int32), empty_scores(size, num_top))
    blocks = (num_logits + block - 1) // block
    ids, scores = run(jnp.int32(0)) if size == block else lax.fori_loop(0, blocks, step, empty)
    return advance(rows, slots, ids), remember(tables, slots, ids), ids, scores


def empty_scores(rows: int, num_top: int) -> tuple[Array, Array, Array, Array]:
    return (
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros((rows, num_top), jnp.int32),
        jnp.zeros((rows, num_top), jnp.float32),
    )
