"""4-bit layouts against GPTQModel's own packing and reading (golden/), the joining of fused weights, the reference.

What `dequantised` gives must equal the library's numbers in every bit: both round one product of float16.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cuda_kernels import dispatch
from cuda_kernels.quant_layout import input_order, joined, nibble_weight, pack, plain_weight, round_to_fp8, unpack
from cuda_kernels.quant_reference import dequantised, linear, rounded_blocks, rounded_fp8
from cuda_kernels.quant_weight import Parts, QuantWeight

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "packed.safetensors")
CASES = ("awq", "gptq", "gptq_act_order", "gptq_v2", "gptq_v2_act_order")
GROUP = 32


def golden(case: str, dtype: torch.dtype = torch.float16) -> QuantWeight:
    names = {"data": "qweight", "zeros": "qzeros", "scale": "scales", "order": "g_idx"}
    fields = {
        field: GOLDEN[f"{case}.{name}"] for field, name in names.items() if f"{case}.{name}" in GOLDEN
    }  # as a loader gathers them
    biased = case.startswith("gptq") and "v2" not in case
    return nibble_weight(case.partition("_")[0], fields, GROUP, int(biased), dtype)


@pytest.mark.parametrize("case", CASES)
def test_reads_what_gptqmodel_wrote(case: str) -> None:
    weight = golden(case)
    assert weight.shape == (32, 128) and (weight.order is not None) == case.endswith("act_order")
    assert torch.equal(dequantised(weight, torch.float16), GOLDEN[f"{case}.weight"])


@pytest.mark.parametrize("case", CASES)
def test_products(case: str) -> None:
    """x @ weight.T of the kept form, and of what a CPU makes of it, is that of the library's weight."""
    weight = golden(case, torch.float32)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    wanted = x @ dequantised(weight, torch.float32).T
    torch.testing.assert_close(wanted, x @ GOLDEN[f"{case}.weight"].float().T, atol=2e-3, rtol=0)  # its f16
    torch.testing.assert_close(linear(x, weight), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dispatch.linear(x, dispatch.settle(weight, x.dtype)), wanted, atol=1e-5, rtol=1e-5)


def test_act_order_is_an_order() -> None:
    """Stored columns are sorted by group: column j is of input order[j]."""
    weight = golden("gptq_act_order")
    assert weight.order is not None
    groups = GOLDEN["gptq_act_order.g_idx"][weight.order.long()]
    assert torch.equal(groups, torch.arange(4).repeat_interleave(GROUP))
    codes = unpack(GOLDEN["gptq_act_order.qweight"].T.contiguous())
    assert torch.equal(unpack(weight.data), codes[:, weight.order.long()])


def test_zeros_of_gptq_v1_come_back_when_they_have_borrowed() -> None:
    """A zero of 0 stored less one is 15 and takes one of the next: the sum as a whole undoes it."""
    zeros = torch.tensor([[0, 3, 0, 15, 8, 1, 0, 0]], dtype=torch.uint8)
    fields = {
        "data": torch.zeros(4, 8, dtype=torch.int32),
        "scale": torch.ones(1, 8),
        "zeros": pack(zeros) - 0x11111111,
        "order": torch.zeros(32, dtype=torch.int32),
    }
    weight = nibble_weight("gptq", fields, 32, 1, torch.float32)
    assert weight.zeros is not None and weight.zeros.flatten().tolist() == zeros.flatten().tolist()


def test_pack_and_unpack() -> None:
    codes = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.dtype == torch.int32 and packed.shape == (3, 8)
    assert torch.equal(unpack(packed), codes)
    assert (packed[0, 0].item() & 0xF, (packed[0, 0].item() >> 28) & 0xF) == (codes[0, 0], codes[0, 7])
    assert input_order(torch.tensor([0, 0, 1, 1], dtype=torch.int32)) is None


def fp8(rows: int, blocks: bool = False, act: str = "token", act_scale: float = 0.0) -> QuantWeight:
    data = torch.randn(rows, 192, generator=torch.Generator().manual_seed(rows)).to(torch.float8_e4m3fn)
    shape = (-(-rows // 128), 2) if blocks else (rows,)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(rows)) + 0.5
    fields = {"data": data, "scale": scale}
    if act == "static":
        fields["act_scale"] = torch.tensor([act_scale])
    return plain_weight("fp8", "block" if blocks else act, fields, blocks)


def rows_of(parts: list[QuantWeight | Tensor]) -> Tensor:
    return torch.cat([part if isinstance(part, Tensor) else dequantised(part, torch.float32) for part in parts])


@pytest.mark.parametrize(
    "parts,whole",
    [
        ([fp8(64), fp8(32)], True),
        ([fp8(128, blocks=True), fp8(64, blocks=True)], True),
        ([fp8(64, blocks=True), fp8(128, blocks=True)], False),  # a block would reach into the second
        ([fp8(64), fp8(32, act="none")], False),
        ([fp8(64), torch.randn(32, 192)], False),
        ([torch.randn(8, 192), torch.randn(32, 192)], True),
        ([fp8(64, act="static", act_scale=0.5), fp8(32, act="static", act_scale=0.5)], True),
        ([fp8(64, act="static", act_scale=0.5), fp8(32, act="static", act_scale=0.25)], False),
        ([golden("gptq"), golden("gptq_v2")], True),
        ([golden("gptq_act_order"), golden("gptq_v2_act_order")], False),  # two orders of the inputs
        ([golden("gptq_act_order"), golden("gptq_act_order")], True),
    ],
)
def test_joined(parts: list[QuantWeight | Tensor], whole: bool) -> None:
    """Kept as one weight where that is possible, and the same product either way, bias included."""
    weight = joined(parts)
    assert isinstance(weight, Parts) != whole
    assert weight.shape == (sum(part.shape[0] for part in parts), parts[0].shape[1])
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(2))
    bias = torch.randn(weight.shape[0])
    wanted = torch.cat([dispatch.linear(x, part) for part in parts], dim=1) + bias
    torch.testing.assert_close(dispatch.linear(x, weight, bias), wanted, atol=1e-4, rtol=1e-5)
    settled = dispatch.settle(weight, torch.float32)
    torch.testing.assert_close(dispatch.linear(x, settled, bias), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype,atol", [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("act", ["token", "static", "block", "none"])
def test_what_a_cpu_makes_of_fp8(act: str, dtype: torch.dtype, atol: float) -> None:
    """The numbers in x's own dtype: no difference in float32 but the order of sums, one rounding more in bfloat16."""
    weight = fp8(64, blocks=act == "block", act=act, act_scale=0.01)
    settled = dispatch.settle(weight, dtype)
    assert not isinstance(settled, QuantWeight) and settled.shape == (64, 192)
    x = torch.randn(7, 192, generator=torch.Generator().manual_seed(8)).to(dtype)
    bias = torch.randn(64, dtype=dtype)
    wanted = linear(x, weight, bias)
    assert dispatch.linear(x, settled, bias).dtype == dtype
    torch.testing.assert_close(dispatch.linear(x, settled, bias), wanted, atol=atol, rtol=0.01 if atol > 0.1 else 1e-5)


def test_rounding_at_load_is_by_row() -> None:
    """Each row's largest number is 448 steps; the error of each number is at most half a step of e4m3 there."""
    plain = torch.randn(48, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 48)[:, None]
    plain[5] = 0
    weight = round_to_fp8(plain)
    assert weight.act == "token" and weight.scale.shape == (48,)
    error = (dequantised(weight, torch.float32) - plain).abs()
    step = torch.maximum(plain.abs() / 16, weight.scale[:, None] * 2**-10)  # 3 bits of mantissa; subnormals
    assert (error <= step * 1.0001).all()
    assert not dequantised(weight, torch.float32)[5].any()


def test_activations_are_rounded_by_row() -> None:
    weight = fp8(64)
    x = torch.randn(6, 192, generator=torch.Generator().manual_seed(4)) * torch.logspace(-4, 4, 6)[:, None]
    x[2] = 0
    codes, scale = rounded_fp8(x, None)
    codes = codes.float()
    assert torch.equal(codes.abs().amax(1) > 447, torch.arange(6) != 2)
    assert torch.equal(codes[2], torch.zeros(192)) and scale.shape == (6, 1)
    alone = torch.cat([linear(row[None], weight) for row in x])
    torch.testing.assert_close(linear(x, weight), alone, atol=0, rtol=1e-4)  # a row is nobody else's business
    blocks = rounded_blocks(x)
    assert (
        blocks.shape == x.shape and ((blocks - x).abs() <= x.abs() / 16 + x.abs().amax(1, keepdim=True) / 2**18).all()
    )


def test_static_scales_saturate() -> None:
    codes, _ = rounded_fp8(torch.tensor([[100.0, -100.0, 0.02]]), torch.tensor([0.01]))
    assert codes.float().tolist()[0][:2] == [448.0, -448.0]


def test_int8_sums_are_exact() -> None:
    data = torch.full((8, 1024), 127, dtype=torch.int8)
    data[:, ::2] = -127
    weight = plain_weight("int8", "token", {"data": data, "scale": torch.ones(8)}, False)
    x = torch.ones(2, 1024)
    x[0, 1::2] = -1
    assert linear(x, weight).tolist() == [[-127.0 * 1024] * 8, [0.0] * 8]


def test_wrong_fields_are_refused() -> None:
    data = torch.zeros(8, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match="scale"):
        QuantWeight(scheme="int8", act="token", data=data, scale=torch.ones(4))
    with pytest.raises(ValueError, match="act_scale"):
        QuantWeight(scheme="int8", act="static", data=data, scale=torch.ones(8))
    with pytest.raises(ValueError, match="act block"):
        QuantWeight(scheme="int8", act="block", data=data, scale=torch.ones(8))
