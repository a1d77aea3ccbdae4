"""The sampling kernels under the Triton interpreter, against backends/torch/sample.py."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported first
pytest.importorskip("triton")

from backends.torch import sample as plain
from cuda_kernels import sampling
from tests.kernels.compiled import compile_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def awkward() -> torch.Tensor:
    """f32 [7, 2500]: rows whose answer, or whose fitness, is a matter of rules."""
    x = draw(7, 2500)
    x[0, [7, 1500, 2499]] = 9.0  # equals: the first
    x[1, 3], x[1, 2000] = NAN, 8.0  # NaN is nothing
    x[2] = -INF
    x[3] = -0.0
    x[3, 1200] = 0.0  # equal to -0
    x[4, 2400] = INF
    x[5] = NAN
    x[6, :2048] = -INF
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1024, 4096])
def test_argmax_and_fitness(dtype: torch.dtype, tile: int) -> None:
    x = awkward().to(dtype)
    found = sampling.scan(x, tile)
    assert torch.equal(sampling.argmax(x), plain.argmax(x.float()))
    assert torch.equal(found.unfit.amax(dim=1) > 0, ~(x < torch.inf).all(dim=1))
    wide = draw(4, 6000).to(dtype)[:, :5000]  # rows with a stride
    assert torch.equal(sampling.argmax(wide), plain.argmax(wide.float()))


@pytest.mark.parametrize("given", [False, True])
def test_the_end_of_a_step_writes_tables_and_the_packed_answer(given: bool) -> None:
    x, padding = awkward(), 9
    slots = torch.tensor([4, 0, 8, 2, 1, 3, padding], device=DEVICE)
    last, outputs = torch.full((10,), -7, device=DEVICE), torch.arange(10, device=DEVICE)
    length = torch.full((10,), 5, dtype=torch.int32, device=DEVICE)
    bad, broken = torch.arange(7, device=DEVICE) % 2 == 0, torch.arange(7, device=DEVICE) > 4
    packed = torch.full((30,), -1, dtype=torch.int32, device=DEVICE)
    tokens = torch.arange(7, device=DEVICE) * 100 if given else plain.argmax(x)
    sampling.end_decode(
        sampling.scan(x), slots, last, outputs, packed, bad,
        broken=broken, lengths=slots.int() + 20, length=length, tokens=tokens if given else None,
    )  # fmt: skip
    expected = torch.cat([tokens, ~(x < torch.inf).all(dim=1), bad, broken]).int()
    assert torch.equal(packed[:28], expected) and packed[28:].tolist() == [-1, -1]
    real = slots[:-1]
    assert torch.equal(last[real], tokens[:-1]) and torch.equal(outputs[real], real + 1)
    assert torch.equal(length[real], real.int() + 20)
    untouched = [5, 6, 7, padding]
    assert (last[untouched] == -7).all() and outputs[untouched].tolist() == untouched
    assert (length[untouched] == 5).all()


def test_without_broken_rows_and_lengths() -> None:
    x, slots = draw(2, 300), torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    last, outputs = torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.zeros(3, device=DEVICE, dtype=torch.int64)
    packed = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    sampling.end_decode(
        sampling.scan(x), slots, last, outputs, packed, torch.zeros(2, device=DEVICE, dtype=torch.int32)
    )
    assert packed.tolist() == [*x.argmax(dim=1).tolist(), 0, 0, 0, 0] and outputs.tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="for 2 rows"):
        sampling.end_decode(sampling.scan(x), slots, last, outputs, packed[:5], slots)


def test_they_compile_for_both_architectures() -> None:
    types = {"logits": "*fp32", "keys": "*i64", "unfit": "*i32", "vocab": "i32", "stride": "i32"}
    scan = ("cuda_kernels.sampling", "scan_kernel", types, {"TILE": 4096})
    types = {"keys": "*i64", "unfit": "*i32", "slots": "*i32", "last_token": "*i64", "num_outputs": "*i64"}
    types |= {"packed": "*i32", "bad": "*i32", "broken": "*u8", "lengths": "*i32", "length": "*i32", "tokens": "*i64"}
    sizes = {"TILES": 32, "BLOCK": 32, "BROKEN": True, "LENGTH": True, "GIVEN": False}
    end = ("cuda_kernels.sampling", "end_kernel", types | {"padding": "i32"}, sizes)
    for made in compile_kernels([(*kernel, arch, {"num_warps": 4}) for kernel in (scan, end) for arch in (80, 90)]):
        assert made["shared"] < 4096
