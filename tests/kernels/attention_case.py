"""Random ragged steps and a plain float32 attention over pages: what the attention kernels are compared with.

Letters as in the kernels: T tokens · S rows · N query heads · K KV heads · H head size · P pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Case:
    """A step of S rows; the cache has what the rows computed before."""

    qkv: Tensor  # [T, (N + 2K) * H]
    cache: Tensor  # [L, 2, P, K, page, H]
    page_table: Tensor  # i32 [max_slots + 1, max_pages]
    slots: Tensor  # i32 [S]
    lengths: Tensor  # i32 [S]
    query_starts: Tensor  # i32 [S + 1]
    write_at: Tensor  # i64 [T]
    cos: Tensor | None  # f32 [T, R / 2]
    sin: Tensor | None
    num_heads: int
    new: list[int]

    @property
    def positions(self) -> list[int]:
        return [n - k + i for n, k in zip(self.lengths.tolist(), self.new, strict=True) for i in range(k)]


def make_case(
    new: list[int],
    lengths: list[int],
    *,
    num_heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    page: int = 16,
    rotary: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    padding: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Rows with `new` tokens each, `lengths` keys in all; then `padding` rows of one token in the padding slot."""
    g = torch.Generator().manual_seed(seed)
    max_pages = -(-max(lengths) // page) + 1
    max_slots = len(new) + 2
    pages = 1 + max_slots * max_pages
    table = torch.zeros(max_slots + 1, max_pages, dtype=torch.int32)
    free = (torch.randperm(pages - 1, generator=g) + 1).tolist()
    slots = torch.randperm(max_slots, generator=g)[: len(new)].tolist()
    write_at, positions = [], []
    for slot, count, length in zip(slots, new, lengths, strict=True):
        for column in range(-(-length // page)):
            table[slot, column] = free.pop()
        for at in range(length - count, length):
            write_at.append(int(table[slot, at // page]) * page + at % page)
            positions.append(at)
    write_at += [0] * padding
    positions += [0] * padding
    lengths, new = lengths + [1] * padding, new + [1] * padding
    slots += [max_slots] * padding
    tokens = sum(new)
    cos = sin = None
    if rotary != 0:
        half = (rotary or head_size) // 2
        angle = torch.tensor(positions)[:, None] * 100.0 ** (-torch.arange(half) / half)
        cos, sin = angle.cos().to(device), angle.sin().to(device)
    cache = torch.randn(2, 2, pages, kv_heads, page, head_size, generator=g, dtype=torch.float32)
    qkv = torch.randn(tokens, (num_heads + 2 * kv_heads) * head_size, generator=g)
    return Case(
        qkv=qkv.to(device, dtype), cache=cache.to(device, cache_dtype or dtype), page_table=table.to(device),
        slots=torch.tensor(slots, dtype=torch.int32, device=device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32, device=device),
        write_at=torch.tensor(write_at, device=device), cos=cos, sin=sin, num_heads=num_heads, new=new,
    )  # fmt: skip


def turned(x: Tensor, cos: Tensor | None, sin: Tensor | None, norm: Tensor | None, eps: float, offset: float) -> Tensor:
    """Normed, then turned, rounded after each. x: [T, N, H] -> [T, N, H]."""
    if norm is not None:
        y = x.float()
        x = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * (norm + offset)).to(x.dtype)
    if cos is None:
        return x
    half = cos.shape[1]
    y = x.float()
    a, b, c, s = y[..., :half], y[..., half : 2 * half], cos[:, None], sin[:, None]
    return torch.cat((a * c - b * s, b * c + a * s, y[..., 2 * half :]), -1).to(x.dtype)


def written(case: Case, layer: int, norms: dict[str, object], scales: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Queries [T, N, H] of a case, after its keys and values went to `case.cache`."""
    _, _, _, kv_heads, page, head_size = case.cache.shape
    q_norm, k_norm, eps, offset = (norms.get(x) for x in ("q_norm", "k_norm", "norm_eps", "norm_offset"))
    eps, offset = eps or 1e-6, offset or 0.0
    heads = case.qkv.view(case.qkv.shape[0], -1, head_size)
    q, k, v = heads.split((case.num_heads, kv_heads, kv_heads), 1)
    q, k = (turned(x, case.cos, case.sin, n, eps, offset) for x, n in ((q, q_norm), (k, k_norm)))
    for part, (x, scale) in enumerate(zip((k, v), scales, strict=True)):
        x = x.float().nan_to_num(0.0, 0.0, 0.0) / scale
        if case.cache.dtype == torch.float8_e4m3fn:
            x = x.clamp(-448.0, 448.0)
        case.cache[layer, part].transpose(1, 2)[case.write_at // page, case.write_at % page] = x.to(case.cache.dtype)
    return q


def expected(
    case: Case,
    q: Tensor,
    layer: int,
    scale: float,
    window: int | None = None,
    logit_cap: float | None = None,
    sinks: Tensor | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Row by row in float32 -> [T, N, H]. Padding rows, all in the null page, are 0."""
    _, _, _, kv_heads, page, head_size = case.cache.shape
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    starts = case.query_starts.tolist()
    for row, (slot, length, count) in enumerate(zip(case.slots.tolist(), case.lengths.tolist(), case.new, strict=True)):
        if slot == case.page_table.shape[0] - 1:
            continue
        where = case.page_table[slot, : -(-length // page)].long()
        k, v = (
            (part[where].transpose(0, 1).reshape(kv_heads, -1, head_size)[:, :length].float() * x)
            for part, x in zip(case.cache[layer].to(torch.float32), scales, strict=True)
        )
        k, v = (x.repeat_interleave(case.num_heads // kv_heads, 0) for x in (k, v))  # [N, C, H]
        mine = q[starts[row] : starts[row] + count].float().transpose(0, 1)  # [N, n, H]
        scores = mine @ k.transpose(1, 2) * scale
        if logit_cap is not None:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        at = torch.arange(length - count, length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)
        hidden = key > at
        if window is not None:
            hidden |= key <= at - window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, count, 1)), -1)
        weights = scores.softmax(-1)[..., :length]
        out[starts[row] : starts[row] + count] = (weights @ v).transpose(0, 1)
    return out
