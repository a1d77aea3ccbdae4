"""Products with weights in few bits against quant_reference, in triton's interpreter or on a GPU; compiled without one.

The interpreter has no arithmetic of bfloat16; bfloat16 is compared where weights and inputs are whole numbers or e4m3,
which become float16 on the way.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.compiled import Kernel, compile_kernels
from tests.kernels.interpreter import DEVICE  # before triton

pytest.importorskip("triton")

from cuda_kernels import dispatch, fused, quant_linear
from cuda_kernels import quant_reference as reference
from cuda_kernels.quant_layout import joined, nibble_weight, plain_weight, round_to_fp8
from cuda_kernels.quant_linear import Plan
from cuda_kernels.quant_weight import QuantWeight
from torch_models.fused_products import fused_quant_linear

OUT, IN, GROUP = 72, 192, 32  # no whole blocks, no whole tiles
EXACT = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 6e-2}
FORMS = (
    "fp8",
    "fp8 static",
    "fp8 alone",
    "blocks",
    "blocks alone",
    "int8",
    "int8 static",
    "int8 alone",
    "awq",
    "order",
)


def random_bits(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)


def make(form: str, dtype: torch.dtype) -> QuantWeight:
    weight = made(form, dtype)
    parts = {name: getattr(weight, name) for name in ("data", "scale", "zeros", "order", "act_scale")}
    return replace(weight, **{name: part.to(DEVICE) for name, part in parts.items() if part is not None})


def made(form: str, dtype: torch.dtype) -> QuantWeight:
    generator = torch.Generator().manual_seed(FORMS.index(form))
    act = "none" if form.endswith("alone") else "static" if form.endswith("static") else "token"
    fixed = torch.tensor([0.02]) if act == "static" else None
    if form.startswith(("fp8", "blocks")):
        weight = replace(round_to_fp8(torch.randn(OUT, IN, generator=generator) / 8), act=act, act_scale=fixed)
        if form.startswith("blocks"):
            scale = torch.rand(1, 2, generator=generator) / 500 + 1e-3
            fields = {"data": weight.data, "scale": scale}
            weight = plain_weight("fp8", "none" if act == "none" else "block", fields, True)
    elif form.startswith("int8"):
        data = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8, generator=generator)
        scale = torch.rand(OUT, generator=generator) / 1000 + 1e-4
        weight = replace(plain_weight("int8", "none", {"data": data, "scale": scale}, False), act=act, act_scale=fixed)
    else:
        fields = {
            "data": random_bits(generator, IN // 8, OUT),
            "zeros": random_bits(generator, IN // GROUP, OUT // 8),
            "scale": torch.rand(IN // GROUP, OUT, generator=generator) / 50,
        }
        if form == "order":
            fields["order"] = torch.randperm(IN, generator=generator).to(torch.int32) % (IN // GROUP)
            weight = nibble_weight("gptq", fields, GROUP, 1, dtype)
        else:
            fields["data"] = random_bits(generator, IN, OUT // 8)
            weight = nibble_weight("awq", fields, GROUP, 0, dtype)
    return weight


def inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)


def close(found: Tensor, wanted: Tensor, slack: Tensor | float = 0.0) -> None:
    """slack: what each value may be off besides, of `unrounded`."""
    tolerance = EXACT[found.dtype]
    allowed = tolerance + tolerance / 4 * wanted.float().abs() + slack
    off = (found.float() - wanted.float()).abs()
    assert bool((off <= allowed).all()), (off - allowed).max()


def unrounded(x: Tensor, weight: QuantWeight) -> Tensor | float:
    """What products of e4m3 by e4m3 may be off: tensor cores add them up with 13 bits behind the largest one's first.

    Each of up to 32 addends of a step loses less than a unit in the last of these places, all sums stay below the sum
    of absolute values. x: [T, I] -> [T, O], or 0 where other products are taken.
    """
    if not quant_linear.plan_of(len(x), weight, x.device).native:
        return 0.0
    sizes = replace(weight, data=weight.data.float().abs().to(weight.data.dtype))
    return reference.linear(x.float().abs(), sizes) * 2.0**-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_products(form: str, dtype: torch.dtype) -> None:
    weight = make(form, dtype)
    for rows in (1, 9):
        x, bias, residual = inputs(rows, IN, dtype), inputs(1, OUT, dtype)[0], inputs(rows, OUT, dtype)
        slack = unrounded(x, weight)
        close(quant_linear.linear(x, weight), reference.linear(x, weight), slack)
        wanted = reference.linear(x, weight, bias).float() + residual.float()
        close(quant_linear.linear(x, weight, bias, residual), wanted, slack)


@pytest.mark.parametrize("form", ["fp8", "blocks", "int8", "int8 alone"])
def test_bfloat16(form: str) -> None:
    x, weight = inputs(5, IN, torch.bfloat16), make(form, torch.bfloat16)
    close(quant_linear.linear(x, weight), reference.linear(x, weight))


@pytest.mark.parametrize("form", ["fp8", "blocks", "int8", "awq"])
def test_split_products_and_many_rows(form: str) -> None:
    """The last program of a tile adds all shares; rows of more than one tile; uneven ends."""
    weight = make(form, torch.float32)
    x = inputs(130, IN, torch.float32)
    unit = 4 if form == "awq" else 128 if form == "blocks" else 32
    for splits in (1, 2):
        plan = Plan(block_in=unit, block_out=32, splits=splits, stages=2, warps=4)
        close(quant_linear.linear(x, weight, plan=plan), reference.linear(x, weight))


@pytest.mark.parametrize("form", FORMS)
def test_many_rows(form: str) -> None:
    """Where a library may take over, the numbers are the same."""
    weight = make(form, torch.float32)
    x, residual = inputs(140, IN, torch.float32), inputs(140, OUT, torch.float32)
    wanted = reference.linear(x, weight) + residual
    close(quant_linear.linear(x, weight, None, residual), wanted, unrounded(x, weight))


@pytest.mark.parametrize("form", ["fp8", "blocks", "int8 static", "order"])
def test_norm_and_gate_in_front(form: str) -> None:
    """As the kernels of their own give them; parts that are kept apart do the same."""
    weight = make(form, torch.float32)
    x, pair, gain = inputs(3, IN, torch.float32), inputs(3, 2 * IN, torch.float32), inputs(1, IN, torch.float32)[0]
    normed = reference.linear(fused.rms_norm(x, gain, 1e-6, 1.0), weight)
    close(quant_linear.linear(x, weight, norm=(gain, 1e-6, 1.0)), normed)
    gated = reference.linear(fused.gated(pair, "gelu_tanh"), weight)
    close(quant_linear.linear(pair, weight, activation="gelu_tanh"), gated)
    apart = joined([weight, torch.zeros(8, IN, device=DEVICE)])
    residual = inputs(3, OUT + 8, torch.float32)
    found = fused_quant_linear(x, apart, None, residual.clone(), norm=(gain, 1e-6, 1.0))  # type: ignore[arg-type]
    close(found, residual + torch.cat((normed, torch.zeros(3, 8, device=DEVICE)), 1))
    with pytest.raises(ValueError, match="activation"):
        quant_linear.linear(x, weight, activation="silu")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMS)
def test_a_poisoned_row_stays_alone(form: str, poison: float) -> None:
    """NaN in a row is NaN in its outputs, whatever integers would make of it; the others do not notice."""
    weight = make(form, torch.float32)
    x = inputs(4, IN, torch.float32)
    wanted = reference.linear(x, weight)
    x[1, 7] = poison
    rest = torch.tensor([0, 2, 3])
    for found in (quant_linear.linear(x, weight), reference.linear(x, weight)):
        assert not torch.isfinite(found[1]).any()
        close(found[rest], wanted[rest])


def test_rows_of_zeros() -> None:
    for form in FORMS:
        assert not quant_linear.linear(torch.zeros(2, IN, device=DEVICE), make(form, torch.float32)).any()
    assert quant_linear.linear(torch.zeros(0, IN, device=DEVICE), make("fp8", torch.float32)).shape == (0, OUT)


def test_dispatch_takes_the_kernels() -> None:
    for scheme in ("fp8", "fp8_block", "int8", "w4"):
        assert dispatch.quant_products(scheme, DEVICE) is quant_linear


@pytest.mark.parametrize("rows", [1, 16, 32, 64, 65, 128, 5000])
@pytest.mark.parametrize("form", ["fp8", "blocks", "int8", "awq"])
def test_plans_fit(form: str, rows: int) -> None:
    """Stages of tiles fit in the shared memory of sm_80 (163 KB) for any number of rows; blocks are whole."""
    weight = make(form, torch.bfloat16)
    plan = quant_linear.plan_of(rows, weight, DEVICE)
    block_rows = min(max(1 << (rows - 1).bit_length(), 8), quant_linear.MOST_ROWS)
    if form == "awq":
        stage = plan.block_in * (4 * plan.block_out + 8 * 2 * block_rows)
    else:
        stage = plan.block_in * (plan.block_out + block_rows)
    assert plan.stages * stage <= 163 << 10
    assert form != "blocks" or plan.block_in == 128


def compiled(arch: int, data: str, rows: int) -> Kernel:
    """product_kernel as plan_of starts it for a weight of 4096 x 4096."""
    scheme, mode, squares = {"*i32": ("w4", 0, False), "*i8": ("int8", 1, False), "*fp8e4nv": ("fp8_block", 3, True)}[
        data
    ]
    weight = replace(make("fp8", torch.bfloat16), act="none")
    object.__setattr__(weight, "scheme", scheme)
    plan = quant_linear.plan_of(rows, weight, DEVICE)
    x = "*bf16" if scheme == "w4" else data
    types = {"x": x, "x_scales": "*fp32", "data": data, "scale": "*bf16" if scheme == "w4" else "*fp32", "zeros": "*i8"}
    types |= {"bias": "*bf16", "residual": "*bf16", "out": "*bf16", "partials": "*fp32", "counters": "*i32"}
    types |= {"num_rows": "i32", "num_out": "i32"}
    constants = {"INNER": 4096, "GROUP": 128 if scheme == "w4" else 0, "MODE": mode, "SQUARES": squares}
    constants |= {"BLOCK_IN": plan.block_in, "BLOCK_OUT": plan.block_out, "BLOCK_ROWS": max(rows, 8), "SPLITS": 2}
    constants |= {
        "STAGES": plan.stages,
        "NATIVE": plan.native,
        "BIAS": True,
        "RESIDUAL": True,
        "DEPENDENT": arch >= 90,
    }
    return ("cuda_kernels.quant_kernels", "product_kernel", types, constants, arch, {"num_warps": plan.warps})


def test_compiles_without_a_gpu() -> None:
    kernels = [compiled(90, data, rows) for data in ("*i32", "*i8", "*fp8e4nv") for rows in (1, 64, 128)]
    kernels += [compiled(80, data, rows) for data in ("*i32", "*i8") for rows in (1, 64)]
    for arch, fp8 in ((80, False), (90, True)):
        types = {"x": "*bf16", "norm_weight": "*fp32", "order": "*i32", "fixed": "*fp32", "scales": "*fp32"}
        types |= {"out": "*fp8e4nv" if fp8 else "*i8", "eps": "fp32", "offset": "fp32"}
        constants = {"INNER": 4096, "BLOCK_IN": 4096, "NORM": True, "KIND": 0, "MODE": 1, "FP8": fp8}
        constants |= {"ORDER": False, "DEPENDENT": arch >= 90}
        kernels.append(("cuda_kernels.quant_kernels", "prepare_kernel", types, constants, arch, {"num_warps": 4}))
    for kernel, done in zip(kernels, compile_kernels(kernels), strict=True):
        limit = 227 << 10 if kernel[4] == 90 else 163 << 10
        assert int(str(done["shared"])) <= limit, (kernel[2].get("data"), kernel[3].get("BLOCK_ROWS"), done["shared"])
        if kernel[1] == "product_kernel":
            assert "mma" in str(done["ptx"])


@pytest.mark.parametrize(
    ("form", "block_rows", "block_out", "stages", "warps"),
    [("fp8", 16, 64, 6, 4), ("fp8", 64, 64, 6, 4), ("fp8", 128, 128, 4, 8), ("blocks", 16, 64, 4, 4)]
    + [("blocks", 64, 128, 4, 4), ("blocks", 128, 128, 4, 8)],
)
def test_e4m3_goes_to_the_tensor_cores_as_it_is(
    form: str, block_rows: int, block_out: int, stages: int, warps: int
) -> None:
    """The plans of sm_90 with NATIVE, which no other machine picks: warp-group products of e4m3 that fit."""
    module, name, types, constants, arch, _ = compiled(90, "*fp8e4nv", 8)
    squares = form == "blocks"
    constants |= {"MODE": 3 if squares else 1, "SQUARES": squares, "NATIVE": True}
    constants |= {"BLOCK_IN": 128, "BLOCK_OUT": block_out, "BLOCK_ROWS": block_rows, "STAGES": stages}
    done = compile_kernels([(module, name, types, constants, arch, {"num_warps": warps})])[0]
    assert int(str(done["shared"])) <= 227 << 10
    wide = [line for line in str(done["ptx"]).splitlines() if "wgmma.mma_async" in line]
    assert wide and all("e4m3.e4m3" in line for line in wide)
