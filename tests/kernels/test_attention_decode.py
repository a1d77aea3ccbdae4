"""The one-token attention kernel under the Triton interpreter, against plain float32 attention over the same pages."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import DEVICE  # isort: skip, first of all


from cuda_kernels import attention_decode
from cuda_kernels.attention_items import make_items
from tests.kernels.attention_case import expected, make_case, written

SMS = 4


def items_of(case, window=None):
    return make_items(case.cache, case.page_table, case.slots, case.lengths, SMS, window=window)


def check(case, *, tolerance=2e-5, workspace=None, scales=(1.0, 1.0), norms=None, **limits):
    """Two runs, for the counters must be 0 again; -> the kernel's output."""
    head_size, norms = case.cache.shape[-1], norms or {}
    before = case.cache.clone()
    q = written(case, 1, norms, scales)
    want = expected(case, q, 1, 0.125, scales=scales, **limits)
    wanted_cache = case.cache.clone()
    case.cache.copy_(before)
    if workspace is None:
        workspace = attention_decode.make_workspace(len(case.new), case.num_heads, head_size, DEVICE)
    items = items_of(case, limits.pop("window", None))
    for _ in range(2):
        got = attention_decode.decode_attention(
            case.qkv, case.cache, 1, case.page_table, items, case.cos, case.sin,
            num_heads=case.num_heads, scale=0.125, workspace=workspace, kv_scales=scales, **norms, **limits,
        )  # fmt: skip
    assert not workspace.counters.any()
    real = case.slots < case.page_table.shape[0] - 1
    got = got.view(want.shape)
    assert got.isfinite().all()
    torch.testing.assert_close(got[real].float(), want[real], atol=tolerance, rtol=tolerance)
    one_ulp = 1e-6 if case.cache.dtype == torch.float32 else 0.13 if case.cache.dtype.itemsize == 1 else 0.02
    kept, wanted = case.cache[:, :, 1:].float(), wanted_cache[:, :, 1:].float()
    if case.cache.dtype.itemsize == 1 and DEVICE.type == "cpu":  # the interpreter's cast to e4m3 loses the carry
        carried = wanted.abs().log2() == wanted.abs().log2().floor()
        kept = kept.where(~carried, wanted)
    torch.testing.assert_close(kept, wanted, atol=one_ulp, rtol=one_ulp)
    return got


def test_lengths_around_pages_and_padding_rows():
    check(make_case([1] * 6, [1, 15, 16, 17, 63, 65], padding=2, device=DEVICE))


def test_one_page_a_tile():
    check(make_case([1] * 3, [64, 129, 200], page=64, device=DEVICE))


def test_pages_that_tiles_do_not_divide():
    check(make_case([1] * 3, [47, 49, 100], page=48, device=DEVICE))


def test_many_splits_are_merged():
    case = make_case([1] * 2, [700, 40], page=64, num_heads=2, kv_heads=1, device=DEVICE)
    check(case)


def test_window_cap_and_sinks():
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)
    check(make_case([1] * 4, [5, 33, 64, 100], device=DEVICE), window=40, logit_cap=3.0, sinks=sinks)
    check(make_case([1] * 2, [600, 300], page=64, device=DEVICE), window=280, sinks=sinks)


def test_norm_and_partial_rope():
    g = torch.Generator().manual_seed(3)
    norms = {"q_norm": torch.randn(64, generator=g).to(DEVICE), "k_norm": torch.randn(64, generator=g).to(DEVICE)}
    check(
        make_case([1] * 3, [9, 32, 70], rotary=32, device=DEVICE), norms=norms | {"norm_eps": 1e-5, "norm_offset": 1.0}
    )


def test_more_rows():
    check(make_case([1] * 20, [1 + 5 * i for i in range(20)], padding=3, num_heads=2, kv_heads=1, device=DEVICE))


def test_no_rope():
    check(make_case([1] * 2, [9, 32], rotary=0, device=DEVICE))


@pytest.mark.parametrize("head_size", [80, 96, 128, 256])
def test_head_sizes(head_size):
    check(make_case([1] * 2, [20, 66], head_size=head_size, num_heads=3, kv_heads=1, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(make_case([1] * 3, [20, 66, 130], dtype=dtype, page=64, device=DEVICE), tolerance=2e-2)


def test_e4m3_pages():
    case = make_case([1] * 2, [20, 66], dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, device=DEVICE)
    check(case, tolerance=6e-2, scales=(0.5, 2.0))


def test_what_is_not_finite_is_stored_as_0():
    case = make_case([1] * 2, [20, 30], device=DEVICE)
    case.qkv[0] = torch.nan
    workspace = attention_decode.make_workspace(2, 4, 64, DEVICE)
    out = attention_decode.decode_attention(
        case.qkv, case.cache, 0, case.page_table, items_of(case), case.cos, case.sin,
        num_heads=4, scale=0.125, workspace=workspace,
    )  # fmt: skip
    assert case.cache.isfinite().all() and out[0].isnan().any() and out[1].isfinite().all()


def test_a_small_workspace_is_refused():
    case = make_case([1] * 4, [20, 30, 40, 300], page=64, device=DEVICE)
    workspace = attention_decode.make_workspace(1, 4, 64, DEVICE)
    with pytest.raises(ValueError, match="too small"):
        attention_decode.decode_attention(
            case.qkv, case.cache, 0, case.page_table, items_of(case), case.cos, case.sin,
            num_heads=4, scale=0.125, workspace=workspace,
        )  # fmt: skip
