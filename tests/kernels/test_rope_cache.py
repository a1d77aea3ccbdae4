"""The rope and cache write kernel under the Triton interpreter, against plain torch."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import DEVICE  # isort: skip, first of all


from cuda_kernels.rope_cache import rope_and_write
from tests.kernels.attention_case import make_case, written


@pytest.mark.parametrize(
    ("head_size", "rotary", "dtype", "normed"),
    [
        (64, None, torch.float32, False),
        (64, 16, torch.float32, True),
        (80, 40, torch.float32, True),
        (128, 0, torch.bfloat16, True),
        (96, None, torch.float16, False),
    ],
)
def test_against_plain_torch(head_size, rotary, dtype, normed):
    case = make_case([5, 1, 14], [5, 40, 30], head_size=head_size, rotary=rotary, dtype=dtype, padding=2, device=DEVICE)
    g = torch.Generator().manual_seed(1)
    norms = {}
    if normed:
        norms = {x: torch.randn(head_size, generator=g).to(DEVICE) for x in ("q_norm", "k_norm")} | {"norm_offset": 1.0}
    before = case.cache.clone()
    q = rope_and_write(case.qkv, case.cache, 1, case.write_at, case.cos, case.sin, num_heads=4, **norms)
    got, case.cache = case.cache, before
    want = written(case, 1, norms)
    near = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(q, want, atol=near, rtol=near)
    torch.testing.assert_close(got[:, :, 1:], case.cache[:, :, 1:], atol=near, rtol=near)
    assert torch.equal(got[0], before[0])  # the other layer


def test_what_is_not_finite_is_stored_as_0():
    case = make_case([3], [3], device=DEVICE)
    case.qkv[1, :] = torch.inf
    rope_and_write(case.qkv, case.cache, 0, case.write_at, None, None, num_heads=4)
    assert case.cache.isfinite().all()
    assert not case.cache[0].transpose(2, 3)[:, case.write_at[1] // 16, case.write_at[1] % 16].any()


def test_32_bit_places():
    case = make_case([3], [18], device=DEVICE)
    q = rope_and_write(case.qkv, case.cache, 0, case.write_at, case.cos, case.sin, num_heads=4)
    first = case.cache.clone()
    again = rope_and_write(case.qkv, case.cache, 0, case.write_at.int(), case.cos, case.sin, num_heads=4)
    assert torch.equal(q, again) and torch.equal(first, case.cache)


def test_a_wrong_table_is_refused():
    case = make_case([3], [3], device=DEVICE)
    with pytest.raises(ValueError, match="cos must be"):
        rope_and_write(case.qkv, case.cache, 0, case.write_at, case.cos[:2], case.sin[:2], num_heads=4)
