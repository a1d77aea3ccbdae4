"""Tiles of keys and scores: the device functions that attention_decode.py and attention_ragged.py share.

Pages are found through the page table, scores are in base 2, and a cap or a sink is applied here.
Letters: M query lanes · N query heads · K KV heads · H head size · P pages · C keys of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


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
def pair_of(x, ASM: tl.constexpr):
    """Values of even and of odd place -> two fp16 [C, H / 2]. x: i16 [C, H / 2], two e4m3 values in each."""
    if ASM:
        even, odd = tl.inline_asm_elementwise(
            "{ .reg .b16 a, b; .reg .b32 c, d; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 c, a; "
            "cvt.rn.f16x2.e4m3x2 d, b; prmt.b32 $0, c, d, 0x5410; prmt.b32 $1, c, d, 0x7632; }",
            "=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:  # the bits of 2 ** -8 times the value, in fp16
        even = (((x & 0x80) << 8) | ((x & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        odd = ((x & -0x8000) | ((x >> 1) & 0x3F80)).to(tl.float16, bitcast=True) * 256.0
        even, odd = even.to(tl.float16), odd.to(tl.float16)
    return even, odd


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
