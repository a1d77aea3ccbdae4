"""Products in pieces and the launch that adds and norms them, in triton's interpreter, against plain torch."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import DEVICE  # isort: skip, first of all

from backends.torch.runner import Runner
from cuda_kernels import fused, small_linear, split_sum
from tests.backends.driver import Driver, llama
from tests.kernels.compiled import compile_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_sum_and_norm(biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 256, device=DEVICE), torch.randn(72, 256, device=DEVICE) / 16
    residual, bias, gain = (
        torch.randn(5, 72, device=DEVICE),
        torch.randn(72, device=DEVICE),
        torch.rand(72, device=DEVICE),
    )
    x, weight, residual, bias = (part.to(dtype) for part in (x, weight, residual, bias))
    given = bias if biased else None
    stream, normed = split_sum.multiply(x, weight, given, residual).normed(gain, 1e-6, 0.5)
    wanted = residual.float() + x.float() @ weight.float().t() + (bias.float() if biased else 0.0)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(stream.float(), wanted, atol=close, rtol=close)
    torch.testing.assert_close(normed.float(), fused.rms_norm(stream, gain, 1e-6, 0.5).float(), atol=close, rtol=close)
    assert torch.equal(split_sum.multiply(x, weight, given, residual).total(), stream)


def test_which_products_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_sum, "multiprocessors", lambda device: 132)

    def cut(*shape: int) -> list[bool]:
        return [split_sum.is_cut(rows, *shape, DEVICE) for rows in (32, 33, 64, 65, 256, 257)]

    assert cut(4096, 14336) == [False, False, False, True, True, False]
    assert cut(1024, 3072) == [False, True, True, True, True, False]
    assert cut(28672, 4096) == [False] * 6
    assert cut(4096, 4112) == [False] * 6  # not of whole pieces


def test_a_decoder_that_cuts_is_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and decode steps, with every product behind attention and in the ffn in two pieces."""

    monkeypatch.setattr(small_linear, "prefers", lambda *args, **options: False)

    def tokens() -> tuple[list[list[int]], list[float]]:
        driver = Driver(Runner(), llama(), seed=5, device=DEVICE.type)
        seqs = [driver.new(driver.prompt(length), num_logprobs=0) for length in (20, 9)]
        driver.generate(seqs, 4, chunk=32)
        return [seq.outputs for seq in seqs], [number for seq in seqs for number in seq.logprobs]

    whole, cut = tokens(), []

    def is_cut(rows: int, outputs: int, inner: int, device: torch.device) -> bool:
        cut.append((rows, inner))
        return True

    monkeypatch.setattr(split_sum, "is_cut", is_cut)
    outputs, logprobs = tokens()
    assert outputs == whole[0]
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(whole[1]), atol=2e-5, rtol=0)
    # 29 tokens of prompts in a step of 32, then two rows
    assert {(32, 64), (32, 96), (2, 64), (2, 96)} <= set(cut)


def test_kernel_compiles() -> None:
    types = {"pieces": "*fp32", "residual": "*bf16", "bias": "*bf16", "norm_weight": "*fp32", "total": "*bf16"}
    types |= {"normed": "*bf16", "num_rows": "i32", "eps": "fp32", "offset": "fp32"}
    constants = {"COUNT": 2, "INNER": 4096, "BLOCK": 4096, "NORM": True}
    kernels = [
        ("cuda_kernels.split_sum", "add_kernel", types, {**constants, "DEPENDENT": arch >= 90}, arch, {"num_warps": 8})
        for arch in (80, 90)
    ]
    for done in compile_kernels(kernels):
        assert "ld.local" not in str(done["ptx"])
