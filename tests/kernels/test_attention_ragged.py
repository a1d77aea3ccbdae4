"""The ragged attention kernel under the Triton interpreter, against plain float32 attention over the same pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.interpreter import DEVICE  # isort: skip, first of all


from cuda_kernels.attention_ragged import RaggedWork, make_work, query_tile, ragged_attention
from tests.kernels.attention_case import expected, make_case, written


def check(case, *, q_tile=8, tolerance=2e-5, scales=(1.0, 1.0), **limits):
    q = written(case, 1, {}, scales).contiguous()
    want = expected(case, q, 1, 0.125, scales=scales, **limits)
    computed = case.lengths.cpu().numpy() - np.array(case.new)
    work = make_work(np.array(case.new), computed, q_tile, DEVICE)
    got = ragged_attention(
        q, case.cache, 1, case.page_table, case.slots, case.query_starts, case.lengths,
        work=work, scale=0.125, kv_scales=scales, **limits,
    )  # fmt: skip
    real = [i for i, at in enumerate(np.repeat(case.slots.cpu(), case.new)) if at < case.page_table.shape[0] - 1]
    torch.testing.assert_close(got[real].float(), want[real], atol=tolerance, rtol=tolerance)
    return got


def test_work_covers_every_query_once():
    work = make_work(np.array([1, 20, 0, 8, 1, 9]), np.zeros(6, np.int64), 8, DEVICE)
    tiles = sorted(work.tiles.tolist())
    assert tiles == [[1, 0], [1, 8], [1, 16], [3, 0], [5, 0], [5, 8]]
    assert [first for _, first in work.tiles.tolist()] == [16, 8, 8, 0, 0, 0]
    assert work.singles.tolist() == [[0, 0], [4, 29]]
    assert query_tile(32, 8) == 16 and query_tile(28, 4) == 9


def test_mixed_rows():
    check(make_case([3, 1, 17, 1, 30], [3, 40, 17, 16, 70], device=DEVICE))


def test_chunks_after_a_prefix_and_padding():
    check(make_case([16, 5], [200, 133], page=64, padding=2, device=DEVICE), q_tile=16)


def test_window_cap_and_sinks():
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)
    check(make_case([20, 1, 9], [100, 90, 9], device=DEVICE), window=24, sinks=sinks)
    check(make_case([20, 1], [100, 90], page=64, device=DEVICE), logit_cap=2.5, sinks=sinks, window=70)


def test_lists_may_be_longer_than_the_work():
    case = make_case([20, 1, 9, 1], [400, 900, 9, 30], page=64, device=DEVICE)  # a row's keys are split
    q = written(case, 1, {}).contiguous()
    work = make_work(np.array(case.new), case.lengths.cpu().numpy() - np.array(case.new), 8, DEVICE)
    nothing = torch.tensor([[-1, 0]], dtype=torch.int32, device=DEVICE)
    longer = RaggedWork(
        q_tile=8, tiles=torch.cat((work.tiles, nothing, nothing)), singles=torch.cat((work.singles, *([nothing] * 14)))
    )
    empty = RaggedWork(q_tile=8, tiles=nothing, singles=nothing)
    tables = (case.page_table, case.slots, case.query_starts, case.lengths)
    want = expected(case, q, 1, 0.125)
    got = ragged_attention(q, case.cache, 1, *tables, work=longer, scale=0.125)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    ragged_attention(q, case.cache, 1, *tables, work=empty, scale=0.125)


@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(7, 1, 80), (3, 3, 96), (2, 1, 128), (2, 1, 256)])
def test_heads(heads, kv_heads, head_size):
    case = make_case([12, 1], [70, 33], num_heads=heads, kv_heads=kv_heads, head_size=head_size, device=DEVICE)
    check(case, q_tile=max(1, 16 // heads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(make_case([30, 1], [90, 66], dtype=dtype, page=64, device=DEVICE), tolerance=2e-2, q_tile=32)


def test_e4m3_pages():
    case = make_case([12, 1], [40, 66], dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, device=DEVICE)
    check(case, tolerance=6e-2, scales=(0.5, 2.0))


def test_a_row_does_not_depend_on_its_neighbours():
    both = make_case([20, 11], [100, 50], device=DEVICE)
    out = check(both)
    q = written(both, 1, {}).contiguous()
    alone = ragged_attention(
        q[:20].contiguous(), both.cache, 1, both.page_table, both.slots[:1], both.query_starts[:2], both.lengths[:1],
        work=make_work(np.array([20]), np.array([0]), 8, DEVICE), scale=0.125,
    )  # fmt: skip
    assert torch.equal(out[:20], alone)
