"""Ragged paged attention in plain torch: runs anywhere, the reference of every other kernel.

Rows with one new token (decode) are gathered in groups of like length, the query heads of a KV head folded into the
query length; rows with more (prefill) go tile by tile over their own pages. Work is proportional to tokens attended,
padded to the longest row of a group.
Letters: T tokens · S rows · N query heads · K KV heads · G = N / K · H head size · C keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TILE_TOKENS = 512  # query tokens of a prefill tile
GROUP_ROWS = 32  # most rows of a decode group
GROUP_SPREAD = 64  # keys by which rows of a group may differ, beyond half of the longest


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows attended together."""

    rows: Tensor  # i64 [R] row of the step
    tokens: Tensor  # i64 [R] token of the step
    lengths: Tensor  # i64 [R] keys of each row, this step's own included
    longest: int
    shortest: int


def decode_groups(
    query_starts: Sequence[int], num_new: Sequence[int], num_computed: Sequence[int], device: torch.device
) -> tuple[DecodeGroup, ...]:
    """Rows with one new token, sorted by length and cut where lengths differ too much."""
    rows = sorted((r for r, new in enumerate(num_new) if new == 1), key=lambda r: -num_computed[r])
    groups: list[list[int]] = []
    for row in rows:
        longest = num_computed[groups[-1][0]] if groups else 0
        if groups and len(groups[-1]) < GROUP_ROWS and num_computed[row] * 2 + GROUP_SPREAD >= longest:
            groups[-1].append(row)
        else:
            groups.append([row])
    made = []
    for group in groups:
        lengths = [num_computed[row] + 1 for row in group]
        numbers = torch.tensor([group, [query_starts[row] for row in group], lengths])
        numbers = (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)
        made.append(DecodeGroup(numbers[0], numbers[1], numbers[2], lengths[0], lengths[-1]))
    return tuple(made)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    *,
    page_tokens: int,
    page_table: Tensor,
    query_starts: Sequence[int],
    num_new: Sequence[int],
    num_computed: Sequence[int],
    write_at: Tensor,
    decodes: tuple[DecodeGroup, ...],
    scale: float,
    window: int | None,
    logit_cap: float | None,
) -> Tensor:
    """Arguments as dispatch.paged_attention and dispatch.Work have them; cache is one layer's: [2, K, P * page, H]."""
    cache[0].index_copy_(1, write_at, k.transpose(0, 1).to(cache.dtype))
    cache[1].index_copy_(1, write_at, v.transpose(0, 1).to(cache.dtype))
    pages = cache.view(2, cache.shape[1], -1, page_tokens * cache.shape[3])  # [2, K, P, page * H]
    limits = (scale, window, logit_cap)
    out = torch.zeros_like(q)
    for group in decodes:
        out[group.tokens] = attend_decode(q[group.tokens], pages, page_table, page_tokens, group, limits)
    for row, (start, new, computed) in enumerate(zip(query_starts, num_new, num_computed, strict=True)):
        for at in range(0, new if new > 1 else 0, TILE_TOKENS):
            count = min(TILE_TOKENS, new - at)
            tile = slice(start + at, start + at + count)
            out[tile] = attend_tile(q[tile], pages, page_table[row], page_tokens, computed + at, limits)
    return out


def attend_decode(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    page_tokens: int,
    group: DecodeGroup,
    limits: tuple[float, int | None, float | None],
) -> Tensor:
    """q: [R, N, H] -> [R, N, H]."""
    scale, window, cap = limits
    rows, heads, size = q.shape
    kv_heads = pages.shape[1]
    first = 0 if window is None else max(0, group.shortest - window) // page_tokens
    columns = page_table[group.rows, first : -(-group.longest // page_tokens)].reshape(-1)
    keys, values = (part.index_select(1, columns).view(kv_heads, rows, -1, size) for part in pages)  # [K, R, C, H]
    position = torch.arange(first * page_tokens, first * page_tokens + keys.shape[2], device=q.device)
    seen = position < group.lengths[:, None]  # [R, C]
    if window is not None:
        seen &= position >= group.lengths[:, None] - window
    folded = q.view(rows, kv_heads, heads // kv_heads, size).transpose(0, 1)  # [K, R, G, H]
    out = attend(folded, keys, values, seen[None, :, None, :], scale, cap)
    return out.transpose(0, 1).reshape(rows, heads, size)


def attend_tile(
    q: Tensor,
    pages: Tensor,
    columns: Tensor,
    page_tokens: int,
    position: int,
    limits: tuple[float, int | None, float | None],
) -> Tensor:
    """Queries of one row at positions from `position` on. q: [n, N, H]; columns: i64 [max_pages] -> [n, N, H]."""
    scale, window, cap = limits
    count, heads, size = q.shape
    kv_heads = pages.shape[1]
    end = position + count
    first = 0 if window is None else max(0, position + 1 - window) // page_tokens
    columns = columns[first : -(-end // page_tokens)]
    begin = first * page_tokens
    keys, values = (
        part.index_select(1, columns).view(kv_heads, -1, size)[:, : end - begin] for part in pages
    )  # [K, C, H]
    group = heads // kv_heads
    folded = q.transpose(0, 1)[None]  # [1, N, n, H]
    if position == 0 and cap is None and (window is None or window >= end):
        out = functional.scaled_dot_product_attention(
            folded, keys[None], values[None], is_causal=True, scale=scale, enable_gqa=group > 1
        )
        return out[0].transpose(0, 1)
    query = torch.arange(position, end, device=q.device)[:, None]
    key = torch.arange(begin, end, device=q.device)
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    keys, values = (x[:, None].expand(-1, group, -1, -1).reshape(1, heads, -1, size) for x in (keys, values))
    return attend(folded, keys, values, seen[None, None], scale, cap)[0].transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, cap: float | None) -> Tensor:
    """Masked softmax attention over the last two axes; k and v may be of another dtype than q."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if cap is None:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~seen, -torch.inf)
    return torch.matmul(scores.softmax(-1).to(q.dtype), v)
