"""Attention of decode rows on a CPU in one C++ call a layer (csrc/cpu_decode.cc), from the qkv product to the heads.

Plain torch takes some twenty small calls and a copy of the pages for the same; it runs where the library does not, and
for what that does not take. Called by dispatch.
Letters: S rows · N query heads · K KV heads · H head size · R rotary size · P pages of a pool.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from cuda_kernels.cpu_library import library

MAX_HEAD_SIZE = 256
DTYPES = (torch.float32, torch.bfloat16)
POINTERS = ("qkv", "out", "cache", "norm", "cos", "sin", "page_table", "write_at", "index")
COUNTS = ("rows", "heads", "kv_heads", "size", "half", "pool_tokens", "page_tokens", "max_pages", "window", "wide")
NUMBERS = ("scale", "logit_cap", "eps")


class Decode(Structure):
    """`Decode` of the C++ file, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in POINTERS),
        *((name, c_int64) for name in COUNTS),
        *((name, c_float) for name in NUMBERS),
    )


def takes(dtype: torch.dtype, cache_dtype: torch.dtype, head_size: int) -> bool:
    """Whether `decode_attention` runs here for such heads."""
    return head_size <= MAX_HEAD_SIZE and dtype in DTYPES and cache_dtype == dtype and library() is not None


def decode_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cache: Tensor,
    *,
    num_heads: int,
    norm: Tensor | None,
    norm_eps: float,
    page_table: Tensor,
    write_at: Tensor,
    index: Tensor,
    page_tokens: int,
    scale: float,
    window: int | None,
    logit_cap: float | None,
) -> Tensor:
    """Norm and turn queries and keys, write keys and values into the pages, attend. -> [S, N * H] of qkv's dtype.

    qkv: [S, (N + 2K) * H], a token a row; cos, sin: f32 [S, R / 2], None without rope; cache: one layer's,
    [2, K, P * page, H], changed in place; norm: f32 [N + K, H], offset included, None without query-key norm;
    page_table: i32 [S, max_pages]; write_at, index: i64 [S], each token's place in the pool and in its sequence.
    """
    _, kv_heads, pool_tokens, size = cache.shape
    rows = len(qkv)
    if qkv.shape[1] != (num_heads + 2 * kv_heads) * size or len(page_table) != rows or len(index) != rows:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not belong to cache {tuple(cache.shape)} and {len(index)} rows")
    wide, counts = torch.float32, torch.int64
    dtypes = (qkv.dtype, wide, wide, qkv.dtype, wide, torch.int32, counts, counts)
    for part, dtype in zip((qkv, cos, sin, cache, norm, page_table, write_at, index), dtypes, strict=True):
        if part is not None and (part.dtype != dtype or not part.is_contiguous()):
            raise ValueError(f"{part.dtype} {tuple(part.shape)}, strides {part.stride()}: expected contiguous {dtype}")
    out = torch.empty(rows, num_heads * size, dtype=qkv.dtype)
    loaded = library()
    if loaded is None:
        raise ValueError("no prebuilt decode library for this machine; ask `takes` first")
    call = Decode(
        qkv.data_ptr(), out.data_ptr(), cache.data_ptr(),
        None if norm is None else norm.data_ptr(),
        None if cos is None else cos.data_ptr(), None if sin is None else sin.data_ptr(),
        page_table.data_ptr(), write_at.data_ptr(), index.data_ptr(),
        rows, num_heads, kv_heads, size, 0 if cos is None else cos.shape[1], pool_tokens, page_tokens,
        page_table.shape[1], window or 0, qkv.dtype == torch.float32, scale, logit_cap or 0.0, norm_eps,
    )  # fmt: skip
    loaded.twinfer_decode(byref(call))
    return out
