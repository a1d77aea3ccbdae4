"""Ragged paged attention in plain torch: runs anywhere, the reference of every other kernel.

Rows with one new token (decode) are gathered in groups of like length, the query heads of a KV head folded into the
query length; which pages and keys they read is worked out once a step, for all layers (`decode_groups`, `gathers`). On
a CPU a long row whose pages follow each other in the pool is read where it lies instead (`spans`).
Rows with more (prefill) attend causally to themselves where that is all they see, else tile by tile over their own
pages. Work is proportional to tokens attended, padded to the longest row of a group.
Letters: T tokens · S rows · N query heads · K KV heads · G = N / K · H head size · C keys · R rows of a group.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TILE_TOKENS = 512  # query tokens of a prefill tile
GROUP_ROWS = 32  # most rows of a decode group
GROUP_SPREAD = 64  # keys by which rows of a group may differ, beyond half of the longest
# Keys and values of a row that cost as much to copy (at about 15 GB/s) as a call of its own costs; a lone row needs
# that call anyway. Measured on 2 cores: 8 rows of 205 KB take 179 us gathered and 140 in place, of 102 KB 101 and 175.
IN_PLACE_BYTES = 160 << 10


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows attended together, in the order of the step."""

    rows: Tensor  # i64 [R] row of the step
    tokens: Tensor | slice  # token of the step: i64 [R], or a slice where they follow each other
    lengths: Tensor  # i64 [R] keys of each row, this step's own included
    longest: int
    shortest: int


@dataclass(frozen=True, slots=True)
class Gather:
    """What a decode group reads of one page table: keys [first, last) of the pages `columns`, a row's side by side."""

    tokens: Tensor | slice
    columns: Tensor  # i64 [R * pages of a row]
    first: int
    last: int
    bias: Tensor | None  # [R, 1, C] of the activations' dtype, 0 = seen, -inf = not; None = all are seen


@dataclass(frozen=True, slots=True)
class Span:
    """A decode row that is read where it lies."""

    token: int  # of the step
    first: int  # keys [first, last) of the pool
    last: int


def spans(
    page_table: Tensor,
    query_starts: Sequence[int],
    num_new: Sequence[int],
    num_computed: Sequence[int],
    page_tokens: int,
    window: int | None,
    token_bytes: int,
) -> dict[int, Span]:
    """Row -> Span of the decode rows to be read in place, in the order of the step.

    page_table: integers [S, max_pages]; token_bytes: keys and values of one token in one layer.
    """
    if page_table.device.type != "cpu":  # the host does not know the pages
        return {}
    rows = [row for row, new in enumerate(num_new) if new == 1]
    fewest = IN_PLACE_BYTES // token_bytes if len(rows) > 1 else 0
    found = {}
    for row in rows:
        length = num_computed[row] + 1
        begin = 0 if window is None else max(0, length - window)
        if length - begin < fewest:
            continue
        column = begin // page_tokens
        pages = page_table[row, column : -(-length // page_tokens)].tolist()
        if pages == list(range(pages[0], pages[0] + len(pages))):
            origin = (pages[0] - column) * page_tokens  # where key 0 would lie
            found[row] = Span(query_starts[row], origin + begin, origin + length)
    return found


def decode_groups(
    query_starts: Sequence[int],
    num_new: Sequence[int],
    num_computed: Sequence[int],
    device: torch.device,
    without: Collection[int] = (),
) -> tuple[DecodeGroup, ...]:
    """Rows with one new token but `without`, sorted by length and cut where lengths differ too much."""
    rows = [row for row, new in enumerate(num_new) if new == 1 and row not in without]
    rows.sort(key=lambda r: -num_computed[r])
    groups: list[list[int]] = []
    for row in rows:
        longest = num_computed[groups[-1][0]] if groups else 0
        if groups and len(groups[-1]) < GROUP_ROWS and num_computed[row] * 2 + GROUP_SPREAD >= longest:
            groups[-1].append(row)
        else:
            groups.append([row])
    made = []
    for group in groups:
        group.sort()
        tokens, lengths = [query_starts[row] for row in group], [num_computed[row] + 1 for row in group]
        numbers = torch.tensor([group, tokens, lengths])
        numbers = (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)
        together = tokens[-1] - tokens[0] + 1 == len(tokens)  # rows with more tokens may lie between
        where = slice(tokens[0], tokens[-1] + 1) if together else numbers[1]
        made.append(DecodeGroup(numbers[0], where, numbers[2], max(lengths), min(lengths)))
    return tuple(made)


def gathers(
    groups: Sequence[DecodeGroup], page_table: Tensor, page_tokens: int, window: int | None, dtype: torch.dtype
) -> tuple[Gather, ...]:
    """The groups' reads of one page table, i64 [S, max_pages]. dtype: of the activations."""
    made = []
    for group in groups:
        begin = 0 if window is None else max(0, group.shortest - window) // page_tokens * page_tokens
        columns = page_table[group.rows, begin // page_tokens : -(-group.longest // page_tokens)].reshape(-1)
        first, last = 0, group.longest - begin
        bias = None
        if group.shortest == group.longest:
            first = 0 if window is None else max(0, group.longest - window) - begin
        else:
            position = torch.arange(begin, group.longest, device=page_table.device)
            hidden = position >= group.lengths[:, None]  # [R, C]
            if window is not None:
                hidden |= position < group.lengths[:, None] - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            bias = bias[:, None]
        made.append(Gather(group.tokens, columns, first, last, bias))
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
    decodes: Sequence[Gather | Span],
    scale: float,
    window: int | None,
    logit_cap: float | None,
) -> Tensor:
    """Arguments as dispatch.paged_attention and dispatch.Work have them; cache is one layer's: [2, K, P * page, H]."""
    k, v = write(k, v, cache, write_at)
    pages = cache.view(2, cache.shape[1], -1, page_tokens * cache.shape[3])  # [2, K, P, page * H]
    if len(decodes) == len(q) and all(isinstance(part, Span) for part in decodes):  # in the order of the step
        return torch.cat([attend_in_place(q, cache, part, scale, logit_cap) for part in decodes])
    out = torch.zeros_like(q)
    for part in decodes:
        if isinstance(part, Span):
            out[part.token] = attend_in_place(q, cache, part, scale, logit_cap)[0]
        elif part.tokens == slice(0, len(q)):
            return attend_decode(q, pages, part, scale, logit_cap)
        else:
            out[part.tokens] = attend_decode(q[part.tokens], pages, part, scale, logit_cap)
    limits = (scale, window, logit_cap)
    for row, (start, new, computed) in enumerate(zip(query_starts, num_new, num_computed, strict=True)):
        if new == 1:
            continue
        if computed == 0 and logit_cap is None and (window is None or window >= new):
            own = slice(start, start + new)
            out[own] = attend_causal(q[own], k[own], v[own], scale)
            continue
        for at in range(0, new, TILE_TOKENS):
            tile = slice(start + at, start + min(at + TILE_TOKENS, new))
            out[tile] = attend_tile(q[tile], pages, page_table[row], page_tokens, computed + at, limits)
    return out


def write(k: Tensor, v: Tensor, cache: Tensor, write_at: Tensor) -> Tensor:
    """Keys and values [T, K, H] into the pages -> [2, T, K, H], as stored. cache: [2, K, P * page, H].

    What is not finite is stored as 0: pages outlive their tenants, and 0 * NaN behind a mask would reach a neighbour.
    The row itself is told by its hidden states, which stay as they are.
    """
    kv = torch.stack((k, v)).nan_to_num_(0.0, 0.0, 0.0).to(cache.dtype)
    cache.index_copy_(2, write_at, kv.transpose(1, 2))
    return kv


def attend_in_place(q: Tensor, cache: Tensor, span: Span, scale: float, cap: float | None) -> Tensor:
    """q: [T, N, H]; cache: [2, K, P * page, H] -> [1, N, H]."""
    _, heads, size = q.shape
    folded = q[span.token].view(1, cache.shape[1], -1, size)  # [1, K, G, H]
    keys, values = cache[:, None, :, span.first : span.last]  # [1, K, C, H]
    return attend(folded, keys, values, None, scale, cap).reshape(1, heads, size)


def attend_decode(q: Tensor, pages: Tensor, group: Gather, scale: float, cap: float | None) -> Tensor:
    """q: [R, N, H] -> [R, N, H]."""
    rows, heads, size = q.shape
    kv_heads = pages.shape[1]
    gathered = pages.index_select(2, group.columns).view(2, kv_heads, rows, -1, size)
    keys, values = gathered[:, :, :, group.first : group.last]  # [K, R, C, H]
    folded = q.view(rows, kv_heads, heads // kv_heads, size).transpose(0, 1)  # [K, R, G, H]
    out = attend(folded, keys, values, None if group.bias is None else group.bias[None], scale, cap)
    return out.transpose(0, 1).reshape(rows, heads, size)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A prompt from its first token on. q: [n, N, H]; k, v: [n, K, H], as stored -> [n, N, H]."""
    keys, values = (x.to(q.dtype).transpose(0, 1)[None] for x in (k, v))
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


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
    query = torch.arange(position, end, device=q.device)[:, None]
    key = torch.arange(begin, end, device=q.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    group = heads // kv_heads
    keys, values = (x[:, None].expand(-1, group, -1, -1).reshape(1, heads, -1, size) for x in (keys, values))
    return attend(q.transpose(0, 1)[None], keys, values, bias, scale, cap)[0].transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """Softmax attention over the last two axes, bias added to the scores; k and v may be of another dtype than q."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if cap is None:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    scores = cap * torch.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias
    return torch.matmul(scores.softmax(-1).to(q.dtype), v)
