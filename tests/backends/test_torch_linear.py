"""Every form of a product on the CPU is the product, at each row count where the form changes; so is its norm."""

from __future__ import annotations

import pytest
import torch

from cuda_kernels import dispatch


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 9, 16, 17, 24, 25])
@pytest.mark.parametrize("outputs", [48, 1023, 13200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("packed", [False, True], ids=["stored", "packed"])
def test_linear(rows: int, outputs: int, dtype: torch.dtype, with_bias: bool, packed: bool) -> None:
    generator = torch.Generator().manual_seed(rows * outputs)
    x = torch.randn(rows, 40, generator=generator).to(dtype)
    weight = torch.randn(outputs, 40, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    out = dispatch.linear(x, dispatch.pack(weight) if packed else weight, bias)
    assert out.dtype == dtype and out.shape == (rows, outputs) and out.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert ((out.double() - exact).abs() <= tolerance * (1 + exact.abs())).all()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])  # below sqrt(eps), where eps counts, and far above
def test_rms_norm(rows: int, size: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 12, 64, generator=generator) * size
    for weight in (torch.randn(64, generator=generator), torch.randn(12, 64, generator=generator)):
        wide = x.double()
        exact = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6) * weight
        out = dispatch.rms_norm(x, weight, 1e-6)
        assert out.dtype == torch.float32 and torch.allclose(out.double(), exact, rtol=2e-6, atol=1e-12)
