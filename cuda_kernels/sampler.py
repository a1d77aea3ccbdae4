"""Random sampling on a GPU: temperature, min-p, top-k, top-p and Philox noise, without sorting. Needs triton.

Three launches. `survey` reads the logits once: rows without filters draw there; of the others it keeps the largest
value of every 64 (peaks). `choose`, one program a row, finds the threshold that enough peaks reach, gathers the few
values above it, and filters and draws among those on chip. Rows for which they are not all that may be kept are left
to `search`, which narrows the interval over the whole row. Whichever way a row takes depends on that row alone.
Called by backends/torch after the processors. Semantics of docs/contract.md, section 5, and backends/torch/sample.py.
Letters: S rows · V vocabulary · C tiles of a row · B peaks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_kernels.candidates import (
    SPAN,
    bounds_of,
    count_threshold,
    gather,
    mass_threshold,
    sum_of_tiles,
    weighed,
)
from cuda_kernels.sampling import best_id, best_key, keyed, sortable

TILE = 2048
ROOM = 2048  # candidates of a row
MOST_PEAKS = tl.constexpr(1024)  # asked for at once; a larger top-k goes to `search`
PEAKS = tl.constexpr(192)  # asked for first where there is no top-k
SEARCH_BLOCK = 8192
SURVEY_WARPS, CHOOSE_WARPS, SEARCH_WARPS = 4, 8, 16
PHILOX_M0, PHILOX_M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
PHILOX_W0, PHILOX_W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


def sample(
    x: Tensor,
    slots: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    num_outputs: Tensor,
) -> tuple[Tensor, Tensor]:
    """(token ids i64 [S], i32 [S] 1 where x holds NaN or +inf). A row of temperature 0 gets its first largest id.

    x: f32, bf16 or f16 [S, V] logits behind the processors; slots: [S]; all others [max_slots + 1]: temperature, min_p
    (0 = off), top_p (1 = off) f32; top_k (0 = off), num_outputs integers; seed: [max_slots + 1, 2], low word first.
    """
    rows, vocab = x.shape
    if x.stride(1) != 1 or seed.shape != (len(temperature), 2) or len(slots) != rows:
        raise ValueError(f"x {tuple(x.shape)} of strides {x.stride()}, {len(slots)} slots, seed {tuple(seed.shape)}")
    device, tiles = x.device, triton.cdiv(vocab, TILE)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    unfit = torch.empty(rows, dtype=torch.int32, device=device)
    if not rows:
        return tokens, unfit
    subs = tiles * (TILE // SPAN)
    keys = torch.empty(rows, tiles, dtype=torch.int64, device=device)
    flags = torch.empty(rows, tiles, dtype=torch.int32, device=device)
    floats = torch.empty(rows, subs + 2 * tiles + ROOM, dtype=torch.float32, device=device)
    integers = torch.empty(rows, subs + ROOM + 1, dtype=torch.int32, device=device)
    of_row = (slots, temperature, min_p, top_k, top_p, seed, num_outputs)
    sizes = {"TILES": tiles, "SUBS": subs}
    survey_kernel[(tiles, rows)](
        x, *of_row, keys, flags, floats, vocab, x.stride(0), **sizes, ROOM=ROOM, TILE=TILE, FAST=x.is_cuda,
        num_warps=SURVEY_WARPS,
    )  # fmt: skip
    blocks = {"TILE_BLOCK": triton.next_power_of_2(tiles), "SUB_BLOCK": triton.next_power_of_2(subs)}
    choose_kernel[(rows,)](
        x, *of_row, keys, flags, floats, integers, tokens, unfit, vocab, x.stride(0), **sizes, **blocks, ROOM=ROOM,
        num_warps=CHOOSE_WARPS,
    )  # fmt: skip
    search_kernel[(rows,)](
        x, *of_row, floats, integers, tokens, vocab, x.stride(0), **sizes, SUB_BLOCK=blocks["SUB_BLOCK"], ROOM=ROOM,
        BLOCK=SEARCH_BLOCK, num_warps=SEARCH_WARPS,
    )  # fmt: skip
    return tokens, unfit


@triton.jit
def philox(c0, c1, k0, k1):
    """Philox-4x32-10 (Salmon et al., SC 2011) of counter (c0, c1, 0, 0); all u32 -> four words."""
    c2 = c1 * 0  # stream 0: sampling
    c3 = c2
    for _ in tl.static_range(10):
        product0, product1 = c0.to(tl.uint64) * PHILOX_M0, c2.to(tl.uint64) * PHILOX_M1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0, k1 = k0 + PHILOX_W0, k1 + PHILOX_W1
    return c0, c1, c2, c3


@triton.jit
def key_of(seed, num_outputs, slot):
    """(output number, key words) of a row, u32."""
    number = tl.load(num_outputs + slot).to(tl.uint32)
    return number, tl.load(seed + 2 * slot).to(tl.uint32), tl.load(seed + 2 * slot + 1).to(tl.uint32)


@triton.jit
def gumbel(word):
    """Standard Gumbel noise of random u32 words."""
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 23 bits: never 0, never 1
    return -tl.log(-tl.log(uniform))


@triton.jit
def words_of_run(number, k0, k1, first, SIZE: tl.constexpr):
    """Random words of the ids [first, first + SIZE); first is a multiple of 4."""
    blocks = (first // 4 + tl.arange(0, SIZE // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox(number + blocks * 0, blocks, k0, k1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # lane = id & 3
    return tl.reshape(words, (SIZE,))


@triton.jit
def noise_of(number, k0, k1, ids):
    """Noise of any ids, i32 >= 0."""
    blocks = (ids // 4).to(tl.uint32)
    w0, w1, w2, w3 = philox(number + blocks * 0, blocks, k0, k1)
    lane = ids & 3
    return gumbel(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))


@triton.jit
def rough_log(x, FAST: tl.constexpr):
    """The logarithm by the chip's own approximation, error 2^-22."""
    if FAST:
        ask: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
        return 0.6931471805599453 * tl.inline_asm_elementwise(ask, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.log(x)


@triton.jit
def rough_gumbel(word, FAST: tl.constexpr):
    """gumbel(word) with an error below 1e-4."""
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    rest = 1.0 - uniform  # exact; near 1 the logarithm is better had from it
    series = rest * (1.0 + rest * (0.5 + rest * (0.33333333 + rest * 0.25)))
    return -rough_log(tl.where(rest < 0.0625, series, -rough_log(uniform, FAST)), FAST)


@triton.jit
def drawn_key(value, ids, heat, words, number, k0, k1, FAST: tl.constexpr):
    """The key of the winner of a tile: found by rough noise, the exact score only of who comes near it."""
    rough = value * (1.0 / heat) + rough_gumbel(words, FAST)
    top = tl.max(rough)
    near = rough >= top - (1e-3 + tl.abs(top) * 1e-6)
    if tl.sum(near.to(tl.int32)) == 1:
        id = tl.max(tl.where(near, ids, 0))
        warm = tl.div_rn(tl.max(tl.where(near, value, -float("inf"))), heat)
        key = keyed(warm + noise_of(number, k0, k1, id), id)
    else:
        key = best_key(tl.div_rn(value, heat) + gumbel(words), ids)
    return key


@triton.jit
def filters_of(slot, min_p, top_k, top_p, vocab):
    """(min_p, top_k or 0, top_p, whether any is on) of a row."""
    floor, mass = tl.load(min_p + slot), tl.load(top_p + slot)
    count = tl.load(top_k + slot).to(tl.int32)
    count = tl.where((count > 0) & (count < vocab), count, 0)
    return floor, count, mass, (floor > 0) | (count > 0) | (mass < 1)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def survey_kernel(
    x,  # [S, V]
    slots,  # [S]
    temperature,  # [max_slots + 1], and so on
    min_p,
    top_k,
    top_p,
    seed,
    num_outputs,
    keys,  # i64 [S, C]
    flags,  # i32 [S, C]
    floats,  # f32 [S, B + 2 C + ROOM]: peaks, tops and sums of the tiles, candidates
    vocab: tl.constexpr,
    stride,
    TILES: tl.constexpr,
    SUBS: tl.constexpr,  # B
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
    FAST: tl.constexpr,
):
    tile, row = tl.program_id(0), tl.program_id(1)
    HERE: tl.constexpr = TILE // SPAN
    ids = tile * TILE + tl.arange(0, HERE)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    value = tl.load(x + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    slot = tl.load(slots + row).to(tl.int32)
    heat = tl.load(temperature + slot)
    _, count, mass, filtered = filters_of(slot, min_p, top_k, top_p, vocab)
    tl.store(flags + row * TILES + tile, 1 - tl.min((value < float("inf")).to(tl.int32)))
    value = tl.where(value == value, value, -float("inf"))
    if heat > 0:
        if filtered:
            peaks = tl.max(value, 1)
            here = floats + row.to(tl.int64) * (SUBS + 2 * TILES + ROOM)
            tl.store(here + tile * HERE + tl.arange(0, HERE), tl.div_rn(peaks, heat))
            if (mass < 1) & (count == 0):  # what top-p is a share of
                top = tl.max(peaks, 0)
                base = tl.where(top > -float("inf"), top, 0.0)
                tl.store(here + SUBS + tile, tl.div_rn(top, heat))
                tl.store(here + SUBS + TILES + tile, tl.sum(tl.exp((value - base) * (1.0 / heat))))
        else:
            number, k0, k1 = key_of(seed, num_outputs, slot)
            words = tl.reshape(words_of_run(number, k0, k1, tile * TILE, TILE), (HERE, SPAN))
            tl.store(keys + row * TILES + tile, drawn_key(value, ids, heat, words, number, k0, k1, FAST))
    else:
        tl.store(keys + row * TILES + tile, best_key(value, ids))


@triton.jit(do_not_specialize_on_alignment=["slots"])
def choose_kernel(
    x,  # [S, V]
    slots,
    temperature,
    min_p,
    top_k,
    top_p,
    seed,
    num_outputs,
    keys,
    flags,
    floats,
    integers,  # i32 [S, B + ROOM + 1]: spans that were kept, ids of the candidates, whether `search` must
    tokens,  # i64 [S]
    unfit,  # i32 [S]
    vocab: tl.constexpr,
    stride,
    TILES: tl.constexpr,
    SUBS: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    SUB_BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
):
    row = tl.program_id(0)
    tile = tl.arange(0, TILE_BLOCK)
    tl.store(unfit + row, tl.max(tl.load(flags + row * TILES + tile, mask=tile < TILES, other=0), 0))
    slot = tl.load(slots + row).to(tl.int32)
    heat = tl.load(temperature + slot)
    floor, count, mass, filtered = filters_of(slot, min_p, top_k, top_p, vocab)
    mine = integers + row.to(tl.int64) * (SUBS + ROOM + 1)
    left = 0
    if (heat > 0) & filtered:
        here = floats + row.to(tl.int64) * (SUBS + 2 * TILES + ROOM)
        source, values, numbers = x + row.to(tl.int64) * stride, here + SUBS + 2 * TILES, mine + SUBS
        top, lowest = bounds_of(here, floor, SUBS, SUB_BLOCK)
        exact = (count > 0) & (count <= MOST_PEAKS)  # as many peaks as ids are wanted: all of these will be found
        share = 0.0  # of the whole row's weight, which the survey knows unless min-p is on
        if (mass < 1) & (count == 0):
            share = mass * sum_of_tiles(here + SUBS, top, TILES, TILE_BLOCK)
        wanted = tl.where(count > 0, tl.minimum(count, MOST_PEAKS), PEAKS)
        least, found, done, left = lowest, lowest * 0, lowest * 0, lowest * 0
        while done == 0:
            least, found = gather(
                source, heat, here, mine, values, numbers, wanted, lowest, top, vocab, SUBS, SUB_BLOCK, ROOM
            )
            left = ((least > lowest) & (exact == 0)).to(tl.int32)
            if (mass < 1) & (count == 0) & (floor <= 0):
                _value, _order, weight = weighed(values, top, tl.minimum(found, ROOM), least, ROOM)
                here_now = tl.sum(weight, 0)
                left = tl.where(here_now >= share, 0, left)
                wanted = tl.where(here_now * 8 < share, MOST_PEAKS, wanted)  # far off: more would not do either
            left = tl.where(found > ROOM, 1, left)
            done = ((left == 0) | (found > ROOM) | (wanted >= MOST_PEAKS)).to(tl.int32)
            wanted = tl.minimum(wanted * 4, MOST_PEAKS)
        found = tl.minimum(found, ROOM)
        kept = least
        warm, order, _weight = weighed(values, top, found, least, ROOM)
        if count > 0:
            kept = count_threshold(order, count, least, sortable(top))
        if mass < 1:
            _value, _order, weight = weighed(values, top, found, kept, ROOM)
            if (count > 0) | (least == lowest):  # all that is kept so far is here
                share = mass * tl.sum(weight, 0)
            kept = mass_threshold(order, weight, share, kept, sortable(top))
        at = tl.arange(0, ROOM)
        ids = tl.load(numbers + at, mask=at < found, other=0)
        number, k0, k1 = key_of(seed, num_outputs, slot)
        score = tl.where((order >= kept) & (at < found), warm + noise_of(number, k0, k1, ids), -float("inf"))
        best = tl.max(score, 0)
        first = tl.min(tl.where((score == best) & (score > -float("inf")), ids, vocab), 0)
        tl.store(tokens + row, tl.where(first < vocab, first, 0).to(tl.int64))
    else:
        tl.store(tokens + row, best_id(keys, row, TILES, TILE_BLOCK).to(tl.int64))
    tl.store(mine + SUBS + ROOM, left)


@triton.jit
def row_block(source, heat, first, vocab, BLOCK: tl.constexpr):
    """(ids, values over temperature) of a piece of a row."""
    ids = first + tl.arange(0, BLOCK)
    value = tl.load(source + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    return ids, tl.div_rn(tl.where(value == value, value, -float("inf")), heat)


@triton.jit
def reaching(source, heat, top, a, b, c, vocab, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """How many values of a row reach each of three keys, or the sums of their weights, f32."""
    at_a, at_b, at_c = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, vocab, BLOCK):
        ids, warm = row_block(source, heat, first, vocab, BLOCK)
        order = sortable(warm)
        weight = tl.where(ids < vocab, tl.exp(warm - top) if WEIGHED else 1.0, 0.0)
        at_a += tl.where(order >= a, weight, 0.0)
        at_b += tl.where(order >= b, weight, 0.0)
        at_c += tl.where(order >= c, weight, 0.0)
    return tl.sum(at_a, 0), tl.sum(at_b, 0), tl.sum(at_c, 0)


@triton.jit
def narrow(source, heat, top, low, wanted, vocab, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key of a row whose reachers are `wanted` or more; low where there is none. A quarter is kept a pass.

    low <= a <= b <= c <= high, and a > low
    """
    low, high = low.to(tl.int64), sortable(top).to(tl.int64)
    while low < high:
        a, b, c = low + (high - low + 3) // 4, low + (2 * (high - low) + 3) // 4, low + (3 * (high - low) + 3) // 4
        of_a, of_b, of_c = reaching(
            source, heat, top, a.to(tl.int32), b.to(tl.int32), c.to(tl.int32), vocab, WEIGHED, BLOCK
        )
        high = tl.where(of_c >= wanted, high, tl.where(of_b >= wanted, c, tl.where(of_a >= wanted, b, a)) - 1)
        low = tl.where(of_c >= wanted, c, tl.where(of_b >= wanted, b, tl.where(of_a >= wanted, a, low)))
    return low.to(tl.int32)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def search_kernel(
    x,  # [S, V]
    slots,
    temperature,
    min_p,
    top_k,
    top_p,
    seed,
    num_outputs,
    floats,
    integers,
    tokens,
    vocab: tl.constexpr,
    stride,
    TILES: tl.constexpr,
    SUBS: tl.constexpr,
    SUB_BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(integers + row.to(tl.int64) * (SUBS + ROOM + 1) + SUBS + ROOM) != 0:
        slot = tl.load(slots + row).to(tl.int32)
        heat = tl.load(temperature + slot)
        floor, count, mass, _filtered = filters_of(slot, min_p, top_k, top_p, vocab)
        source = x + row.to(tl.int64) * stride
        peaks = floats + row.to(tl.int64) * (SUBS + 2 * TILES + ROOM)
        top, kept = bounds_of(peaks, floor, SUBS, SUB_BLOCK)
        if count > 0:
            kept = narrow(source, heat, top, kept, count.to(tl.float32), vocab, False, BLOCK)
        if mass < 1:
            whole, _same, _again = reaching(source, heat, top, kept, kept, kept, vocab, True, BLOCK)
            kept = narrow(source, heat, top, kept, mass * whole, vocab, True, BLOCK)
        number, k0, k1 = key_of(seed, num_outputs, slot)
        key = tl.full((), -(2**63), tl.int64)
        for first in tl.range(0, vocab, BLOCK):
            ids, warm = row_block(source, heat, first, vocab, BLOCK)
            score = warm + gumbel(words_of_run(number, k0, k1, first, BLOCK))
            key = tl.maximum(key, best_key(tl.where(sortable(warm) >= kept, score, -float("inf")), ids))
        tl.store(tokens + row, ((key & 0x7FFFFFFF) ^ 0x7FFFFFFF))
