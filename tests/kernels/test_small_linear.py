"""Small-batch products against plain torch, in triton's interpreter or on a GPU; compilation for sm_80 and sm_90."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.compiled import compile_kernels
from tests.kernels.interpreter import DEVICE  # before triton

triton = pytest.importorskip("triton")

from cuda_kernels import small_linear  # noqa: E402
from cuda_kernels.small_linear_plan import LIBRARY, Plan, _entries, plan_of  # noqa: E402

VECTOR = Plan(kernel="vector", block_out=4, stages=2, programs=1)
TILE = Plan(kernel="tile", block_out=16, block_in=32)
SPLIT = Plan(kernel="tile", block_out=32, block_in=16, splits=3)
APART = Plan(kernel="tile", block_out=16, block_in=16, norm_apart=True)
ONE_ROW = [(plan, 1) for plan in (VECTOR, TILE, SPLIT, LIBRARY)]
MORE_ROWS = [(plan, rows) for plan in (TILE, SPLIT, APART, LIBRARY) for rows in (2, 7, 33)] + [(TILE, 64), (SPLIT, 130)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)


def normed(x: Tensor, gain: Tensor, offset: float) -> Tensor:
    wide = x.double()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * (gain.double() + offset)
    return wide.to(x.dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm()) < TOLERANCE[dtype]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# many rows in one dtype alone: the others differ in the load of a tile, not in its rows
CASES = [
    (plan, rows, dtype)
    for plan, rows in ONE_ROW + MORE_ROWS
    for dtype in TOLERANCE
    if rows <= 7 or dtype == torch.bfloat16
]


@pytest.mark.parametrize("plan,rows,dtype", CASES, ids=lambda v: v.kernel if isinstance(v, Plan) else str(v))
def test_each_entry_point(plan: Plan, rows: int, dtype: torch.dtype) -> None:
    """I is no multiple of a block, O has a tail."""
    inner, outs = 72, 50
    x, weight = random(rows, inner, dtype=dtype), random(outs, inner, dtype=dtype, scale=inner**-0.5)
    gain, bias, residual = random(inner).abs() + 0.5, random(outs, dtype=dtype), random(rows, outs, dtype=dtype)
    close(small_linear.linear(x, weight, bias, plan=plan), product(x, weight, bias), dtype)
    close(
        small_linear.linear_add(x, weight, bias, residual.clone(), plan=plan),
        product(x, weight, bias) + residual,
        dtype,
    )
    close(small_linear.linear_add(x, weight, None, residual.clone(), plan=plan), product(x, weight) + residual, dtype)
    y = normed(x, gain, 1.0)
    close(small_linear.norm_linear(x, gain, EPS, 1.0, weight, bias, plan=plan), product(y, weight, bias), dtype)
    logits = small_linear.head(x, gain, EPS, 1.0, weight, plan=plan)
    assert logits.dtype == torch.float32
    close(logits, product(y, weight), dtype)
    gate, up = product(normed(x, gain, 0.0), weight, bias).chunk(2, -1)
    gated = small_linear.norm_gated(x, gain, EPS, 0.0, weight, bias, plan=plan)
    close(gated, functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("plan,rows", [(VECTOR, 1), (TILE, 3), (SPLIT, 3), (LIBRARY, 3)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_activations(activation: str, plan: Plan, rows: int) -> None:
    x, weight, gain = random(rows, 64), random(36, 64, scale=0.3), random(64).abs() + 0.5
    gate, up = product(normed(x, gain, 0.0), weight).chunk(2, -1)
    gate = {
        "silu": functional.silu,
        "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
        "gelu": functional.gelu,
    }[activation](gate)
    got = small_linear.norm_gated(x, gain, EPS, 0.0, weight, activation=activation, plan=plan)
    close(got, gate * up, torch.float32)


def test_sums_of_splits_leave_the_counters_at_rest_and_repeat_bitwise() -> None:
    x, weight = random(5, 96, dtype=torch.bfloat16), random(70, 96, dtype=torch.bfloat16)
    first, again = (small_linear.linear(x, weight, plan=SPLIT) for _ in range(2))
    assert torch.equal(first, again)
    assert not small_linear.resting_counters(x.device).any()


def test_large_float16_rows_do_not_overflow_in_the_norm() -> None:
    x = torch.full((2, 64), 3e4, dtype=torch.float16, device=DEVICE)
    weight, gain = random(16, 64, dtype=torch.float16), torch.full((64,), 4.0, device=DEVICE)
    close(small_linear.norm_linear(x, gain, EPS, 0.0, weight, plan=TILE), product(normed(x, gain, 0.0), weight),
          torch.float16)  # fmt: skip


def test_out_of_the_head_is_written_and_checked() -> None:
    x, weight, gain = random(2, 32), random(20, 32), random(32).abs()
    out = torch.full((2, 20), torch.nan, device=DEVICE)
    assert small_linear.head(x, gain, EPS, 0.0, weight, out=out, plan=TILE) is out
    close(out, product(normed(x, gain, 0.0), weight), torch.float32)
    with pytest.raises(ValueError, match="does not hold"):
        small_linear.head(x, gain, EPS, 0.0, weight, out=out[:1])
    with pytest.raises(ValueError, match="activation"):
        small_linear.norm_gated(x, gain, EPS, 0.0, weight, activation="relu")
    with pytest.raises(ValueError, match="one row"):
        small_linear.linear(x, weight, plan=VECTOR)
    assert small_linear.linear(x[:0], weight, plan=TILE).shape == (0, 20)


def test_the_table() -> None:
    """Every entry is a plan that could run, and what it holds no entry for goes to cuBLAS."""
    for gated, num_out, inner, rows, plan in _entries():
        assert plan_of(rows, num_out, inner, gated) == plan
        assert plan.kernel in ("vector", "tile", "library")
        assert plan.kernel != "vector" or rows == 1
    assert plan_of(4096, 6144, 4096, False) == LIBRARY
    assert not small_linear.prefers(4096, (6144, 4096), torch.bfloat16)
    assert not small_linear.supported(1, (6144, 4096), torch.int8)


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_the_table_s_choice_is_right(rows: int) -> None:
    x, weight = random(rows, 128, dtype=torch.bfloat16), random(96, 128, dtype=torch.bfloat16, scale=0.1)
    gain, residual = random(128).abs() + 0.5, random(rows, 96, dtype=torch.bfloat16)
    close(small_linear.norm_linear(x, gain, EPS, 0.0, weight), product(normed(x, gain, 0.0), weight), x.dtype)
    close(small_linear.linear_add(x, weight, None, residual.clone()), product(x, weight) + residual, x.dtype)
    gate, up = product(normed(x, gain, 0.0), weight).chunk(2, -1)
    close(small_linear.norm_gated(x, gain, EPS, 0.0, weight), functional.silu(gate) * up, x.dtype)


TYPES = {"norm_weight": "*fp32", "partials": "*fp32", "counters": "*i32", "eps": "fp32", "offset": "fp32"}
TYPES |= dict.fromkeys(("x", "weight", "bias", "residual", "out"), "*bf16")
FUSED = {"NORM": True, "BIAS": True, "RESIDUAL": True, "INNER": 1024, "REQUEST": 2}
VECTOR_KERNEL = {**FUSED, "BLOCK_IN": 1024, "BLOCK_OUT": 4, "TRIPS": 3, "STAGES": 3, "KIND": 1}
TILE_KERNEL = {**FUSED, "BLOCK_IN": 64, "BLOCK_OUT": 64, "BLOCK_ROWS": 16, "SPLITS": 2, "STAGES": 4, "KIND": 2}


def test_they_compile_for_both_architectures() -> None:
    """On sm_90 the vector kernel asks for its first weights, and for nothing else, before it waits."""
    module, jobs = "cuda_kernels.small_linear_kernels", []
    for arch in (80, 90):
        more = {"DEPENDENT": arch >= 90}
        options = {"num_warps": 4, "launch_pdl": arch >= 90}
        vector = {k: v for k, v in TYPES.items() if k not in ("partials", "counters")} | {"num_out": "i32"}
        tile = {**TYPES, "num_rows": "i32", "num_out": "i32"}
        jobs.append((module, "vector_kernel", vector, VECTOR_KERNEL | more, arch, options))
        jobs.append((module, "tile_kernel", tile, TILE_KERNEL | more, arch, options))
    vector80, tile80, vector90, tile90 = (str(made["ptx"]) for made in compile_kernels(jobs))
    assert "mma.sync" in tile80 and "wgmma" in tile90
    assert "griddepcontrol" not in vector80 + tile80
    assert "cp.async" not in tile90.split("griddepcontrol.wait")[0]
    commits = vector90.count("cp.async.commit"), vector90.split("griddepcontrol.wait")[0].count("cp.async.commit")
    # gate and up: STAGES - 1 before the loop and one in it, whose block comes before that of the wait in the text
    assert commits == (2 * VECTOR_KERNEL["STAGES"], 2 * VECTOR_KERNEL["STAGES"])
