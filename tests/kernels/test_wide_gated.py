"""Gate and up of many rows in one launch against float64, in triton's interpreter or on a GPU; it compiles without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.compiled import compile_kernels
from tests.kernels.interpreter import DEVICE  # before triton

pytest.importorskip("triton")

from cuda_kernels import wide_gated
from tests.backends.driver import Driver, llama

WIDTH, INNER = 192, 128


def inputs(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    parts = [torch.randn(*shape, generator=generator) for shape in ((rows, INNER), (2 * WIDTH, INNER), (2 * WIDTH,))]
    return tuple((part / 4).to(DEVICE, dtype) for part in parts)  # type: ignore[return-value]


def wanted(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    pair = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    gate, up = pair.chunk(2, dim=1)
    act = torch.nn.functional.silu(gate) if kind == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    return act * up


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [65, 127, 128, 130])
def test_as_in_float64(rows: int, kind: str) -> None:
    """One rounding, and sums in float32."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter has no bfloat16
    x, weight, bias = inputs(rows, dtype)
    for given in (None, bias):
        found, want = wide_gated.multiply(x, weight, given, kind), wanted(x, weight, given, kind)
        assert found.dtype == dtype
        half_step = torch.finfo(dtype).eps / 2
        assert bool(((found.double() - want).abs() <= want.abs() * half_step * 1.01 + 1e-5).all())


def test_which_products_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_gated, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(wide_gated, "can_overlap", lambda device: True)

    def taken(width: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> list[bool]:
        weight = torch.empty(2 * width, inner, dtype=dtype, device="meta")
        return [wide_gated.takes(rows, weight) for rows in (65, 127, 128, 129)]

    assert taken(14336, 4096) == [False, False, True, False]
    assert taken(14336, 4096, torch.float32) == taken(3072, 1024) == taken(14336, 4100) == [False] * 4
    assert taken(14336 + 32, 4096) == [False] * 4
    monkeypatch.setattr(wide_gated, "can_overlap", lambda device: False)
    assert taken(14336, 4096) == [False] * 4


def test_a_decoder_with_it_is_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.torch.runner import Runner

    def tokens() -> tuple[list[list[int]], list[float]]:
        driver = Driver(Runner(), llama(), seed=5, device=DEVICE.type)
        seqs = [driver.new(driver.prompt(length), num_logprobs=0) for length in (20, 9)]
        driver.generate(seqs, 4, chunk=32)
        return [seq.outputs for seq in seqs], [number for seq in seqs for number in seq.logprobs]

    whole, taken = tokens(), []
    plain = wide_gated.multiply

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        taken.append(len(x))
        return plain(x, weight, bias, activation)

    monkeypatch.setattr(wide_gated, "takes", lambda rows, weight: True)
    monkeypatch.setattr(wide_gated, "TILE", 32)
    monkeypatch.setattr(wide_gated, "STEP", 32)
    monkeypatch.setattr(wide_gated, "multiply", multiply)
    outputs, logprobs = tokens()
    assert outputs == whole[0]
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(whole[1]), atol=2e-5, rtol=0)
    assert {2, 32} <= set(taken)


def test_kernel_compiles() -> None:
    rows, out, step = wide_gated.ROWS, wide_gated.TILE, wide_gated.STEP
    types = {"x": f"tensordesc<bf16[{rows}, {step}]>", "tiles": f"tensordesc<bf16[2, {out}, {step}]>"}
    types |= {"out": f"tensordesc<bf16[{rows}, {out}]>", "bias": "*bf16"}
    sizes = {"WIDTH": 14336, "INNER": 4096, "BLOCK_ROWS": rows, "BLOCK_OUT": out, "BLOCK_IN": step}
    sizes |= {"KIND": 1, "DEPENDENT": True}
    done = compile_kernels([("cuda_kernels.wide_gated", "wide_kernel", types, sizes, 90, {"num_warps": 4})])[0]
    assert int(str(done["shared"])) <= 113 << 10  # two programs of a multiprocessor
    assert "wgmma.mma_async" in str(done["ptx"])
    assert ".local" not in str(done["ptx"])
