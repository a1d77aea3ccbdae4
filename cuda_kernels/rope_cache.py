"""Query-key norm, rope and the cache write of a step, as one Triton launch for any number of tokens.

`rope_and_write` serves steps in which a row may have many tokens; gpu_attention.py calls it. attention_decode.py does
the same inside its own launch with the device functions of this file. What is not finite is stored as 0: pages outlive
their tenants, and 0 * NaN behind a mask would reach a neighbour.
Letters: T tokens · N query heads · K KV heads · H head size · R rotary size · P pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T = 8  # tokens of a program


@triton.jit
def load_turned(
    heads,  # [M, 1] addresses of the heads' first values
    turns,  # [M, 1] offsets of the tokens' cos and sin
    norm_weight,  # f32 [H]
    cos,  # f32 [T, R / 2]
    sin,
    wanted,  # [M, 1] rows to load
    eps,
    offset,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,  # R / 2; 0 = no rope
    NORM: tl.constexpr,
):
    """Heads normed and turned -> f32 [M, BLOCK_H], 0 beyond H. Rounded between the two as the plain code does."""
    dtype = heads.dtype.element_ty
    dims = tl.arange(0, BLOCK_H)[None, :]
    mask = wanted & (dims < HEAD)
    x = tl.load(heads + dims, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / HEAD + eps)[:, None]
        gain = tl.load(norm_weight + dims, mask=dims < HEAD, other=0.0).to(tl.float32) + offset
        x = (x * inverse * gain).to(dtype).to(tl.float32)
    if HALF > 0:
        turning = dims < 2 * HALF
        other = tl.where(dims < HALF, dims + HALF, dims - HALF)  # the half that a value is mixed with
        y = tl.load(heads + other, mask=mask & turning, other=0.0).to(tl.float32)
        if NORM:
            gain = tl.load(norm_weight + other, mask=turning, other=0.0).to(tl.float32) + offset
            y = (y * inverse * gain).to(dtype).to(tl.float32)
        angle = turns + tl.where(dims < HALF, dims, dims - HALF)
        c = tl.load(cos + angle, mask=wanted & turning, other=1.0)
        s = tl.load(sin + angle, mask=wanted & turning, other=0.0)
        x = x * c + y * tl.where(dims < HALF, -s, s)
    return x


@triton.jit
def storable(x, inverse_scale, ACT: tl.constexpr, STORED: tl.constexpr):
    """f32 values as the cache keeps them: rounded to the activations' dtype, then to the cache's."""
    x = x.to(ACT).to(tl.float32)
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    if tl.float8e4nv == STORED:
        x = tl.minimum(tl.maximum(x * inverse_scale, -448.0), 448.0)  # e4m3 has no infinity: saturate
    return x.to(STORED)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["write_at"])
def rope_write_kernel(
    qkv,  # [T, (N + 2K) * H]
    q_out,  # [T, N, H]
    k_pages,  # [P, K, page, H]
    v_pages,
    write_at,  # [T] page * page_tokens + offset
    cos,
    sin,
    q_norm,
    k_norm,
    num_tokens,
    eps,
    offset,
    inverse_k_scale,
    inverse_v_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has BLOCK tokens of one head; heads are those of q, then k, then v."""
    ACT: tl.constexpr = qkv.dtype.element_ty
    STORED: tl.constexpr = k_pages.dtype.element_ty
    head = tl.program_id(1)
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    wanted = tokens < num_tokens
    dims = tl.arange(0, BLOCK_H)[None, :]
    mask = wanted & (dims < HEAD)
    heads = qkv + tokens.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD) + head * HEAD
    if head < NUM_HEADS:
        x = load_turned(heads, tokens * HALF, q_norm, cos, sin, wanted, eps, offset, HEAD, BLOCK_H, HALF, Q_NORM)
        tl.store(q_out + (tokens.to(tl.int64) * NUM_HEADS + head) * HEAD + dims, x.to(ACT), mask=mask)
    else:
        at = tl.load(write_at + tokens, mask=wanted, other=0).to(tl.int64)
        kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
        place = ((at // PAGE * NUM_KV_HEADS + kv_head) * PAGE + at % PAGE) * HEAD + dims
        if head < NUM_HEADS + NUM_KV_HEADS:
            x = load_turned(heads, tokens * HALF, k_norm, cos, sin, wanted, eps, offset, HEAD, BLOCK_H, HALF, K_NORM)
            tl.store(k_pages + place, storable(x, inverse_k_scale, ACT, STORED), mask=mask)
        else:
            x = tl.load(heads + dims, mask=mask, other=0.0).to(tl.float32)
            tl.store(v_pages + place, storable(x, inverse_v_scale, ACT, STORED), mask=mask)


def rotary_half(cos: Tensor | None, rows: int, head_size: int) -> int:
    """R / 2 of the tables, checked against the step. cos: f32 [T, R / 2]."""
    if cos is None:
        return 0
    if cos.shape[0] != rows or cos.dtype != torch.float32 or not cos.is_contiguous() or 2 * cos.shape[1] > head_size:
        raise ValueError(f"cos must be f32 [{rows}, <= {head_size // 2}], contiguous, not {cos.dtype} {cos.shape}")
    return cos.shape[1]


def rope_and_write(
    qkv: Tensor,
    cache: Tensor,
    layer: int,
    write_at: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Queries normed and turned -> [T, N, H]; keys (likewise) and values go to the pages.

    qkv: [T, (N + 2K) * H]; cache: [L, 2, P, K, page, H], changed in place; write_at: i64 or i32 [T], page * page
    tokens + offset; cos, sin: f32 [T, R / 2]; q_norm, k_norm: f32 [H]; kv_scales: an e4m3 cache keeps x / scale.
    """
    _, _, _, kv_heads, page, head_size = cache.shape
    count = qkv.shape[0]
    if qkv.shape[1] != (num_heads + 2 * kv_heads) * head_size or not qkv.is_contiguous():
        raise ValueError(f"qkv must be [T, {(num_heads + 2 * kv_heads) * head_size}], contiguous, not {qkv.shape}")
    half = rotary_half(cos, count, head_size)
    q = torch.empty(count, num_heads, head_size, dtype=qkv.dtype, device=qkv.device)
    if count == 0:
        return q
    rope_write_kernel[(triton.cdiv(count, BLOCK_T), num_heads + 2 * kv_heads)](
        qkv, q, cache[layer, 0], cache[layer, 1], write_at, cos, sin, q_norm, k_norm,
        count, float(norm_eps), float(norm_offset), 1.0 / kv_scales[0], 1.0 / kv_scales[1],
        NUM_HEADS=num_heads, NUM_KV_HEADS=kv_heads, HEAD=head_size, BLOCK_H=triton.next_power_of_2(head_size),
        HALF=half, Q_NORM=q_norm is not None, K_NORM=k_norm is not None, PAGE=page, BLOCK=BLOCK_T, num_warps=2,
    )  # fmt: skip
    return q
