"""Decode rows of plain torch attention: read where they lie or gathered, the answer is that of a dense softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_kernels import paged_attention as plain

PAGE, KV_HEADS, HEADS, SIZE = 8, 2, 4, 16
TOKEN_BYTES = plain.IN_PLACE_BYTES // 20  # rows of 20 keys or more are long
SCALE = 0.3


def table_of(rows: list[list[int]]) -> Tensor:
    """i32 [S, max_pages], padded with the null page."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)


def decode(table: Tensor, lengths: list[int], window: int | None, cap: float | None) -> tuple[int, Tensor, Tensor]:
    """(rows read in place, what came out, what a dense softmax gives), of rows with one new token each."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = len(lengths)
    cache = torch.randn(2, KV_HEADS, 32 * PAGE, SIZE, generator=generator)
    q, k, v = (torch.randn(rows, n, SIZE, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS))
    starts, new, computed = list(range(rows)), [1] * rows, [n - 1 for n in lengths]
    write_at = torch.tensor([int(table[r, c // PAGE]) * PAGE + c % PAGE for r, c in enumerate(computed)])
    spans = plain.spans(table, starts, new, computed, PAGE, window, TOKEN_BYTES)
    groups = plain.decode_groups(starts, new, computed, torch.device("cpu"), spans)
    out = plain.paged_attention(
        q, k, v, cache, page_tokens=PAGE, page_table=table, query_starts=starts, num_new=new, num_computed=computed,
        write_at=write_at, decodes=(*spans.values(), *plain.gathers(groups, table, PAGE, window, q.dtype)),
        scale=SCALE, window=window, logit_cap=cap,
    )  # fmt: skip
    exact = []
    for row, length in enumerate(lengths):
        begin = 0 if window is None else max(0, length - window)
        at = torch.tensor([int(table[row, p // PAGE]) * PAGE + p % PAGE for p in range(begin, length)])
        keys, values = (part[:, at].repeat_interleave(HEADS // KV_HEADS, dim=0) for part in cache)  # [N, C, H]
        assert torch.equal(keys[0, -1], k[row, 0])  # the step's own keys have been written
        scores = torch.einsum("nh,nch->nc", q[row], keys) * SCALE
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        exact.append(torch.einsum("nc,nch->nh", scores.softmax(-1), values))
    return len(spans), out, torch.stack(exact)


FOLLOWING, OTHER, SHORT, LATE = [3, 4, 5, 6], [12, 9, 10, 11], [20], [30, 23, 24, 25]


@pytest.mark.parametrize(
    ("pages", "lengths", "window", "in_place"),
    [
        ([FOLLOWING], [30], None, 1),
        ([SHORT], [3], None, 1),  # a lone row is read in place however short
        ([OTHER], [30], None, 0),
        ([FOLLOWING, SHORT], [30, 3], None, 1),
        ([OTHER, FOLLOWING, SHORT, LATE], [30, 25, 3, 27], None, 1),
        ([FOLLOWING, [13, 14, 15, 16]], [32, 21], None, 2),
        ([LATE], [30], 20, 1),  # the page out of line is behind the window
        ([LATE, FOLLOWING], [30, 28], 21, 2),
        ([LATE, FOLLOWING], [30, 28], 10, 0),  # few keys are left
    ],
)
@pytest.mark.parametrize("cap", [None, 2.0], ids=["plain", "capped"])
def test_decode(
    pages: list[list[int]], lengths: list[int], window: int | None, in_place: int, cap: float | None
) -> None:
    count, out, exact = decode(table_of(pages), lengths, window, cap)
    assert count == in_place
    assert torch.allclose(out, exact, atol=1e-5)
