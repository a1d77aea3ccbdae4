"""The few largest values of a row, found without reading it again: device functions of sampler.py and score.py.

A survey kept the largest value of every SPAN (a peak). A value that reaches the n-th largest peak lies in a span whose
peak does, and at least n values do; so only those spans are read again. Needs triton.
Letters: V vocabulary · B peaks of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cuda_kernels.sampling import sortable

SPAN = tl.constexpr(64)
SPANS_AT_ONCE = tl.constexpr(32)
LOWEST = tl.constexpr(-2139095040)  # the key of the least finite float: -inf is never gathered


@triton.jit
def count_threshold(order, wanted, low, high):
    """A key which the `wanted` largest reach and those equal to the least of them, but no others; low if fewer do.

    order: i32 keys; low, high: the least and the largest answer.
    """
    low, high = low.to(tl.int64), high.to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        count = tl.sum((order >= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(count >= wanted, middle, low)
        high = tl.where(count == wanted, middle, tl.where(count > wanted, high, middle - 1))
    return low.to(tl.int32)


@triton.jit
def mass_threshold(order, weights, wanted, low, high):
    """The largest key of which those that reach it weigh `wanted` or more; low if none. order: i32; weights: f32."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        enough = tl.sum(tl.where(order >= middle.to(tl.int32), weights, 0.0), 0) >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def sum_of_tiles(tops, top, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of exp(x - top) over a row. tops: f32 [2, TILES] the largest x of each tile, and its sum from there."""
    tile = tl.arange(0, BLOCK)
    of_tile = tl.load(tops + tile, mask=tile < TILES, other=-float("inf"))
    sums = tl.load(tops + TILES + tile, mask=tile < TILES, other=0.0)
    return tl.sum(sums * tl.exp(of_tile - top), 0)


@triton.jit
def weighed(values, top, found, least, ROOM: tl.constexpr):
    """(values of the candidates, their keys, weights exp(value - top) of those that reach `least`, 0 of others)."""
    at = tl.arange(0, ROOM)
    value = tl.load(values + at, mask=at < found, other=-float("inf"))
    order = sortable(value)
    return value, order, tl.where((at < found) & (order >= least), tl.exp(value - top), 0.0)


@triton.jit
def bounds_of(peaks, floor, SUBS: tl.constexpr, BLOCK: tl.constexpr):
    """(largest value of a row, least key that min-p keeps). peaks: f32 [B]; floor: min_p, 0 = off."""
    span = tl.arange(0, BLOCK)
    top = tl.max(tl.load(peaks + span, mask=span < SUBS, other=-float("inf")), 0)
    return top, tl.where(floor > 0, tl.maximum(sortable(top + tl.log(floor)), LOWEST), LOWEST)


@triton.jit
def gather(
    source,  # [V] logits of the row
    heat,  # its temperature
    peaks,  # f32 [B] of the logits over temperature
    spans,  # i32 [B] scratch
    values,  # f32 [ROOM] to write
    ids,  # i32 [ROOM] to write
    wanted,  # how many peaks
    lowest,  # no key under this one is wanted
    top,  # the largest value
    vocab,
    SUBS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
):
    """-> (least key gathered, how many); more than ROOM: not all were written. They are in the order of their ids."""
    span = tl.arange(0, BLOCK)
    order = sortable(tl.load(peaks + span, mask=span < SUBS, other=-float("inf")))
    least = count_threshold(order, wanted, lowest, sortable(top))
    tl.debug_barrier()  # a former turn's readers are done
    chosen = (order >= least).to(tl.int32)
    tl.store(spans + tl.cumsum(chosen, 0) - 1, span, mask=chosen > 0)
    tl.debug_barrier()  # other threads read what was stored
    found = 0
    row = tl.arange(0, SPANS_AT_ONCE * SPAN)
    first, count = 0, tl.sum(chosen, 0)
    while first < count:
        nth = first + row // SPAN
        inside = nth < count
        at = tl.load(spans + nth, mask=inside, other=0) * SPAN + row % SPAN
        inside = inside & (at < vocab)
        value = tl.load(source + at, mask=inside, other=-float("inf")).to(tl.float32)
        value = tl.div_rn(tl.where(value == value, value, -float("inf")), heat)
        kept = (inside & (sortable(value) >= least)).to(tl.int32)
        place = found + tl.cumsum(kept, 0) - 1
        tl.store(values + place, value, mask=(kept > 0) & (place < ROOM))
        tl.store(ids + place, at, mask=(kept > 0) & (place < ROOM))
        found += tl.sum(kept, 0)
        first += SPANS_AT_ONCE
    tl.debug_barrier()
    return least, found
