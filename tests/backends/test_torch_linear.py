"""Every form of a product on the CPU is the product, at each row count where the form changes."""

from __future__ import annotations

import pytest
import torch

from cuda_kernels import dispatch


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 12, 13, 24, 25])
@pytest.mark.parametrize("outputs", [48, 1023, 1024, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_linear(rows: int, outputs: int, dtype: torch.dtype, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows * outputs)
    x = torch.randn(rows, 40, generator=generator).to(dtype)
    weight = torch.randn(outputs, 40, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    out = dispatch.linear(x, weight, bias)
    assert out.dtype == dtype and out.shape == (rows, outputs) and out.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert ((out.double() - exact).abs() <= tolerance * (1 + exact.abs())).all()
