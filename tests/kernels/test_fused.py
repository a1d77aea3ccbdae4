"""The elementwise kernels under the Triton interpreter, against the torch layers they stand for."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported first
pytest.importorskip("triton")

from cuda_kernels import fused
from tests.kernels.compiled import compile_kernels
from torch_models.layers import ACTIVATIONS, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE_ULP = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(ONE_ULP)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 100), (3, 1024)])
def test_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = draw(rows, width, dtype=dtype), draw(width, seed=2)
    near = {"rtol": ONE_ULP[dtype], "atol": ONE_ULP[dtype]}
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-5, 1.0), rms_norm(x, weight, 1e-5, 1.0), **near)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(activation: str, dtype: torch.dtype) -> None:
    gate_up = draw(3, 2 * 2100, dtype=dtype) * 3
    gate, up = gate_up.float().chunk(2, dim=1)
    near = {"rtol": ONE_ULP[dtype], "atol": ONE_ULP[dtype]}
    torch.testing.assert_close(fused.gated(gate_up, activation).float(), ACTIVATIONS[activation](gate) * up, **near)


def test_inputs_with_strides_and_without_rows() -> None:
    wide = draw(4, 128)
    weight = draw(64)
    torch.testing.assert_close(
        fused.rms_norm(wide[:, ::2], weight, 1e-6, 0.0), rms_norm(wide[:, ::2], weight, 1e-6, 0.0)
    )
    assert fused.rms_norm(wide[:0], draw(128), 1e-6, 0.0).shape == (0, 128)
    assert fused.gated(wide[:0], "silu").shape == (0, 64)


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match="norm_weight"):
        fused.rms_norm(draw(2, 8), draw(4), 1e-6, 0.0)
    with pytest.raises(ValueError, match="activation 'relu'"):
        fused.gated(draw(2, 8), "relu")


def test_they_compile_to_wide_loads_for_both_architectures() -> None:
    of_norm = {"x": "*bf16", "norm_weight": "*fp32", "out": "*bf16", "eps": "fp32", "offset": "fp32"}
    norm = ("cuda_kernels.fused", "norm_kernel", of_norm, {"INNER": 4096, "BLOCK": 4096, "DEPENDENT": False})
    sizes = {"num_out": 14336, "BLOCK": fused.PIECE, "KIND": 1, "DEPENDENT": False}
    gated = ("cuda_kernels.fused", "gated_kernel", {"pair": "*bf16", "out": "*bf16"}, sizes)
    for made in compile_kernels(
        [(*kernel, arch, {"num_warps": w}) for kernel, w in ((norm, 8), (gated, 4)) for arch in (80, 90)]
    ):
        assert "ld.global.v4.b32" in made["ptx"] or "ld.global.L1::no_allocate.v4.b32" in made["ptx"]
