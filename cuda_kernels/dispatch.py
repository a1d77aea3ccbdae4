"""Which kernel runs where: the only device branches of the PyTorch side.

Called by torch_models (linear, paged_attention) and by backends/torch (cache shapes). Takes tensors and plain values.
Letters: T tokens · S rows · N query heads · K KV heads · H head size · L layers of a pool · P pages of a pool.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from cuda_kernels import cpu_decode, cpu_linear, cpu_norm, quant_reference
from cuda_kernels import paged_attention as plain
from cuda_kernels.quant_weight import Parts, QuantWeight, Weight, WideWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What attention must do in this step for the layers of one group.

    Row r owns tokens [query_starts[r], query_starts[r] + num_new[r]) of the step, at positions from num_computed[r] on.
    The three lists are the host's, so that no kernel choice waits for the device.
    """

    page_tokens: int
    page_table: Tensor  # i32 [S, max_pages]
    query_starts: Sequence[int]  # [S]
    num_new: Sequence[int]  # [S]
    num_computed: Sequence[int]  # [S] tokens in the cache before this step
    write_at: Tensor  # i64 [T] page * page_tokens + offset of each token
    index: Tensor  # i64 [T] each token's index in its sequence
    one_call: bool = False  # decode_attention takes this step; `decodes` is empty then
    attention: Callable[..., tuple[Tensor, Tensor]] | None = None  # takes every step in place of the kernels here
    decodes: tuple[plain.Gather | plain.Span, ...]  # rows with one new token, those that are gathered in groups


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, of x's dtype. x: [T, I]; weight: [O, I]; bias: [O] -> [T, O]."""
    if not isinstance(weight, Tensor):
        return quant_linear(x, weight, bias)
    return (cpu_linear if x.device.type == "cpu" else functional).linear(x, weight, bias)


def quant_linear(x: Tensor, weight: QuantWeight | Parts | WideWeight, bias: Tensor | None) -> Tensor:
    """The same against a weight in few bits."""
    if isinstance(weight, QuantWeight):
        return quant_products(weight.scheme, x.device).linear(x, weight, bias)
    if isinstance(weight, Parts):
        out = torch.cat([linear(x, part) for part in weight.parts], dim=-1)
    else:
        codes, scale = quant_reference.wide_input(x, weight)
        out = cpu_linear.linear(codes, weight.data, None)
        out = out if scale is None else (out * scale).to(x.dtype)
    return out if bias is None else out + bias


@functools.cache
def quant_products(scheme: str, device: torch.device) -> Any:
    """The module whose `linear` multiplies a QuantWeight here: quant_linear or quant_reference."""
    if has_fused_kernels(device):
        from cuda_kernels import quant_linear as kernels  # needs triton

        if kernels.takes(scheme, device):
            return kernels
    return quant_reference


def pack(weight: Tensor) -> Tensor:
    """A product's weight, [O, I], as `linear` likes it best where it lies; nothing else can read the result."""
    return weight if weight.device.type != "cpu" or has_fused_kernels(weight.device) else cpu_linear.pack(weight)


def settle(weight: Weight, dtype: torch.dtype) -> Weight:
    """The same of any weight, [O, I]. dtype: of x. A CPU has fast products of int8 and of x's own dtype only."""
    if isinstance(weight, Tensor):
        return pack(weight)
    if isinstance(weight, Parts):
        return Parts(tuple(cast(QuantWeight | WideWeight | Tensor, settle(part, dtype)) for part in weight.parts))
    on_cpu = weight.data.device.type == "cpu" and not has_fused_kernels(weight.data.device)
    if isinstance(weight, WideWeight) or not on_cpu or (weight.scheme == "int8" and weight.act != "none"):
        return weight
    return quant_reference.widened(weight, dtype, cpu_linear.pack)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, f32. x: f32 [..., D]; weight: f32 [D], or a head's own: [N, D]."""
    if x.device.type == "cpu":
        return cpu_norm.rms_norm(x, weight, eps)
    if weight.dim() == 1:
        return functional.rms_norm(x, weight.shape, weight, eps)
    return functional.rms_norm(x, weight.shape[-1:], None, eps) * weight


def has_fused_kernels(device: torch.device) -> bool:
    """Whether the triton kernels run here: on a GPU with triton installed, or in triton's interpreter."""
    wanted = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and find_spec("triton") is not None


def decodes_in_one_call(device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, head_size: int) -> bool:
    """Whether `decode_attention` takes steps in which every row has one token."""
    return device.type == "cpu" and cpu_decode.takes(dtype, cache_dtype, head_size)


def decode_attention(
    qkv: Tensor,
    turn: tuple[Tensor | None, Tensor | None],
    cache: Tensor,
    layer_index: int,
    work: Work,
    *,
    num_heads: int,
    norm: Tensor | None,
    norm_eps: float,
    scale: float,
    window: int | None,
    logit_cap: float | None,
) -> Tensor:
    """All between the qkv product and the output product of a step with work.one_call. -> [T, N * H] of qkv's dtype.

    qkv: [T, (N + 2K) * H]; turn: cos and sin, f32 [T, R / 2], None without rope; norm: of queries and keys,
    f32 [N + K, H], its offset included; cache: as paged_attention has it, changed in place.
    """
    return cpu_decode.decode_attention(
        qkv,
        *turn,
        cache[layer_index],
        num_heads=num_heads,
        norm=norm,
        norm_eps=norm_eps,
        page_table=work.page_table,
        write_at=work.write_at,
        index=work.index,
        page_tokens=work.page_tokens,
        scale=scale,
        window=window,
        logit_cap=logit_cap,
    )


def cache_shape(
    num_layers: int, num_pages: int, page_tokens: int, num_kv_heads: int, head_size: int, fused: bool
) -> tuple[int, ...]:
    """Keys, then values of a pool. fused: for the triton kernels [L, 2, P, K, page, H], where a page lies together;
    else [L, 2, K, P * page, H], where a head's tokens do, so that pages gather without a turn.
    """
    if fused:
        return (num_layers, 2, num_pages, num_kv_heads, page_tokens, head_size)
    return (num_layers, 2, num_kv_heads, num_pages * page_tokens, head_size)


def copy_page(cache: Tensor, source: int, target: int, count: int, page_tokens: int) -> None:
    """Copy the first `count` tokens of a page in all layers. cache: as cache_shape has it."""
    if cache.dim() == 6:
        cache[:, :, target, :, :count] = cache[:, :, source, :, :count]
    else:
        target, source = target * page_tokens, source * page_tokens
        cache[..., target : target + count, :] = cache[..., source : source + count, :]


def write_keys(k: Tensor, v: Tensor, cache: Tensor, layer_index: int, work: Work) -> None:
    """This step's keys and values into the pages, as paged_attention does it. k, v: [T, K, H]."""
    plain.write(k, v, cache[layer_index], work.write_at)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    layer_index: int,
    work: Work,
    *,
    scale: float,
    window: int | None = None,
    logit_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Write this step's keys and values into the pages, then attend. -> ([T, N, H] of q's dtype, cache).

    q: [T, N, H]; k, v: [T, K, H]; cache: [L, 2, K, P * page, H], changed in place. A query at position p sees keys in
    (p - window, p]. logit_cap: cap * tanh(logits / cap) before the softmax.
    """
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    if k.shape != v.shape or k.shape != (tokens, kv_heads, size) or heads % kv_heads:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together")
    if work.attention is not None:
        return work.attention(q, k, v, cache, layer_index, scale=scale, window=window, logit_cap=logit_cap)
    if cache.shape[1:3] != (2, kv_heads) or cache.shape[4] != size:
        raise ValueError(f"cache {tuple(cache.shape)} does not hold k {tuple(k.shape)}")
    out = plain.paged_attention(
        q,
        k,
        v,
        cache[layer_index],
        page_tokens=work.page_tokens,
        page_table=work.page_table,
        query_starts=work.query_starts,
        num_new=work.num_new,
        num_computed=work.num_computed,
        write_at=work.write_at,
        decodes=work.decodes,
        scale=scale,
        window=window,
        logit_cap=logit_cap,
    )
    return out, cache
