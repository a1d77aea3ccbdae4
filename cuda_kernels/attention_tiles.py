"""Tiles of queries and keys, scores: what attention_decode.py, attention_ragged.py and invariant_attention.py share.

Pages are found through the page table, scores are in base 2, and a cap or a sink is applied here.
Letters: M query lanes · N query heads · K KV heads · H head size · P pages · C keys of a tile.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


def query_tiles(num_new: np.ndarray, num_computed: np.ndarray, q_tile: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, first query) of each tile of rows with several tokens, i64 [W, 2], and i64 rows that have one.

    num_new, num_computed: [S] tokens of each row in a step, and those before. The tiles with most keys come first.
    """
    new, before = np.asarray(num_new, np.int64), np.asarray(num_computed, np.int64)
    lone, several = np.flatnonzero(new == 1), np.flatnonzero(new > 1)
    counts = -(-new[several] // q_tile)
    rows = np.repeat(several, counts)
    firsts = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * q_tile
    order = np.argsort(-(before[rows] + firsts), kind="stable")
    return np.stack((rows[order], firsts[order]), 1), lone


def laid_out(tiles: np.ndarray, singles: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as i32 on the device, by one copy. tiles, singles: [..., 2]."""
    host = torch.from_numpy(np.concatenate((tiles, singles)).astype(np.int32))
    there = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
    return there[: len(tiles)], there[len(tiles) :]


@triton.jit
def scores_of(q, k, factor, cap, CAP: tl.constexpr):
    """Scores in base 2 -> f32 [M, C]. q: [M, H]; k: [H, C]; factor and cap: of `score_factors`."""
    return softcap(tl.dot(q, k, input_precision="ieee") * factor, cap, CAP)


@triton.jit
def softcap(s, cap, CAP: tl.constexpr):
    if CAP:  # s comes as 2 * score / cap, and tanh(x) = 2 * sigmoid(2 x) - 1
        s = cap * (2 * tl.sigmoid(s) - 1)
    return s


@triton.jit
def for_products(q, FP16: tl.constexpr):
    """Queries in the dtype of the products with keys."""
    if FP16:
        q = tl.minimum(tl.maximum(q.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    return q


@triton.jit
def page_of(table, at, end, PAGE: tl.constexpr, C: tl.constexpr):
    """The page of a tile that lies in one, asked for a tile ahead: then key loads wait for no other load."""
    page = 0
    if PAGE % C == 0:
        page = tl.load(table + at // PAGE, mask=at < end, other=0)
    return page


@triton.jit
def key_offsets(
    table, page, keys, at, end, kv_head, K: tl.constexpr, PAGE: tl.constexpr, HEAD: tl.constexpr, C: tl.constexpr
):
    """Offsets of keys `at + arange(C)` in a layer's pages -> i64 [C]. page: of `page_of`."""
    if PAGE % C == 0:
        return ((page.to(tl.int64) * K + kv_head) * PAGE + at % PAGE) * HEAD + keys * HEAD
    position = at + keys
    page = tl.load(table + position // PAGE, mask=position < end, other=0).to(tl.int64)
    return ((page * K + kv_head) * PAGE + position % PAGE) * HEAD


@triton.jit
def request_tile(pages, page, at, kv_head, K: tl.constexpr, PAGE: tl.constexpr, HEAD: tl.constexpr, C: tl.constexpr):
    """Ask the L2 cache for a tile of keys or values that lies in one page."""
    LINE: tl.constexpr = 1024 // pages.dtype.element_ty.primitive_bitwidth  # values of 128 bytes
    start = pages + ((page.to(tl.int64) * K + kv_head) * PAGE + at % PAGE) * HEAD
    lines = (start + tl.arange(0, C * HEAD // LINE) * LINE).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def request_tiles(
    k_pages, v_pages, table, low, end, kv_head, SKIPPED: tl.constexpr, COUNT: tl.constexpr,
    K: tl.constexpr, PAGE: tl.constexpr, HEAD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`request_tile` for keys and values of the tiles from `low` on, up to COUNT of them without the first SKIPPED."""
    for tile in tl.static_range(SKIPPED, COUNT):
        at = (low + tile) * C
        if at < end:
            page = page_of(table, at, end, PAGE, C)
            request_tile(k_pages, page, at, kv_head, K, PAGE, HEAD, C)
            request_tile(v_pages, page, at, kv_head, K, PAGE, HEAD, C)


@triton.jit
def add_sinks(sinks, heads, top, weight, total, SINKS: tl.constexpr):
    """The sinks of `heads` as one more key without a value."""
    if SINKS:
        sink = tl.load(sinks + heads).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(top, sink)
        kept = tl.exp2(top - higher)
        weight = weight * kept + tl.exp2(sink - higher)
        total = total * kept[:, None]
    return weight, total


def score_factors(scale: float, logit_cap: float | None, k_scale: float) -> tuple[float, float]:
    """(factor, cap) of `softcap`: scores in base 2, capped or not."""
    if logit_cap is None:
        return scale * k_scale * LOG2_E, 0.0
    return 2.0 * scale * k_scale / logit_cap, logit_cap * LOG2_E


def fp16_products(q: Tensor, cache: Tensor) -> bool:
    """Whether the products with keys and values are done in fp16: it holds e4m3 exactly, and weights in [0, 1]."""
    return cache.dtype == torch.float8_e4m3fn and q.dtype != torch.float32
