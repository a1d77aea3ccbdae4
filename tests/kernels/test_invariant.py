"""Products and attention of --batch-invariant: right, and the same bit by bit in every call. Interpreter or GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.attention_case import Case, expected, make_case, written
from tests.kernels.compiled import compile_kernels
from tests.kernels.interpreter import DEVICE  # before triton

triton = pytest.importorskip("triton")

from cuda_kernels import invariant_attention, invariant_linear  # noqa: E402
from cuda_kernels.invariant_linear import FEW, MANY, MANY_GATED, SOME  # noqa: E402

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PARTS = ((0, 1), (3, 5), (20, 37), (36, 37))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("inner", [72, 1100])  # the second in four pieces
def test_a_row_is_right_and_its_own(inner: int, dtype: torch.dtype) -> None:
    outs, rows = 50, 37
    x, weight = random(rows, inner, dtype=dtype), random(outs, inner, dtype=dtype, scale=inner**-0.5)
    gain, bias, residual = random(inner).abs() + 0.5, random(outs, dtype=dtype), random(rows, outs, dtype=dtype)
    wide = x.double()
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * (gain.double() + 1.0)).to(dtype).double()
    products = y @ weight.double().t()
    gate, up = (products + bias.double()).chunk(2, -1)

    def every(start: int, end: int) -> list[Tensor]:
        some = x[start:end]
        return [
            invariant_linear.linear(some, weight, bias),
            invariant_linear.linear_add(some, weight, None, residual[start:end]),
            invariant_linear.norm_linear(some, gain, EPS, 1.0, weight, bias),
            invariant_linear.norm_gated(some, gain, EPS, 1.0, weight, bias),
            invariant_linear.head(some, gain, EPS, 1.0, weight),
        ]

    whole = every(0, rows)
    wanted = [
        wide @ weight.double().t() + bias.double(),
        wide @ weight.double().t() + residual.double(),
        products + bias.double(),
        functional.silu(gate) * up,
        products,
    ]
    for got, want in zip(whole, wanted, strict=True):
        close(got, want, dtype)
    assert whole[-1].dtype == torch.float32
    for start, end in PARTS:
        for part, all_rows in zip(every(start, end), whole, strict=True):
            assert torch.equal(part, all_rows[start:end])
    assert not invariant_linear.resting_counters(x.device).any()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="asks the tensor cores; numpy's sums depend on the shape")
@pytest.mark.parametrize("shape", [(512, 2048), (9000, 512)])
def test_tiles_of_any_size_make_the_same_bits(shape: tuple[int, int]) -> None:
    x, weight = random(200, shape[1], dtype=torch.bfloat16), random(*shape, dtype=torch.bfloat16, scale=0.02)
    first = invariant_linear.product(x, weight, None, tile=FEW)
    for tile in (SOME, MANY, MANY_GATED, replace(FEW, inner=64)):
        assert torch.equal(invariant_linear.product(x, weight, None, tile=tile), first), tile


def test_what_does_not_belong_together_is_refused() -> None:
    x, weight = random(3, 32), random(20, 32)
    with pytest.raises(ValueError, match="and weight"):
        invariant_linear.linear(x, random(20, 31))
    with pytest.raises(ValueError, match="residual"):
        invariant_linear.linear_add(x, weight, None, random(3, 19))
    with pytest.raises(ValueError, match="activation"):
        invariant_linear.norm_gated(x, random(32), EPS, 0.0, weight, activation="relu")
    with pytest.raises(ValueError, match="does not hold"):
        invariant_linear.head(x, random(32), EPS, 0.0, weight, out=torch.empty(2, 20, device=DEVICE))
    assert invariant_linear.linear(x[:0], weight).shape == (0, 20)


def attend(case: Case, q: Tensor, **limits: Any) -> Tensor:
    _, _, _, kv_heads, page, size = case.cache.shape
    new = np.array(case.new)
    before = case.lengths.cpu().numpy() - new
    tiles = invariant_attention.make_tiles(
        new, before, invariant_attention.query_tile(case.num_heads, kv_heads), DEVICE
    )
    keys = case.page_table.shape[1] * page
    scratch = invariant_attention.make_scratch(max(8, len(new)), case.num_heads, kv_heads, size, keys, DEVICE)
    out = invariant_attention.attention(
        q, case.cache, 1, case.page_table, case.slots, case.query_starts, case.lengths,
        tiles=tiles, scratch=scratch, scale=0.1, **limits,
    )  # fmt: skip
    assert not scratch.counters.any()
    return out


@pytest.mark.parametrize("limits", [{}, {"window": 90}, {"logit_cap": 5.0}], ids=str)
@pytest.mark.parametrize(
    "dtype,stored", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float8_e4m3fn)], ids=str
)
def test_a_query_has_one_answer(
    limits: dict[str, Any], dtype: torch.dtype, stored: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last token of a chunk and as a decode token alone, its chunks in one program's hands or in several."""
    monkeypatch.setattr(invariant_attention, "CHUNK", 64)
    new, lengths = [1, 40, 3, 1], [200, 190, 70, 1]
    case = make_case(new, lengths, head_size=48, dtype=dtype, cache_dtype=stored, padding=1, device=DEVICE.type)
    q = written(case, 1, {}).contiguous()
    out, want = attend(case, q, **limits), expected(case, q, 1, 0.1, limits.get("window"), limits.get("logit_cap"))
    torch.testing.assert_close(out[:-1].float(), want[:-1], atol=2e-2 if stored else 1e-2, rtol=0)
    starts = case.query_starts.tolist()
    for row in range(3):
        token = starts[row + 1] - 1
        alone = replace(
            case, slots=case.slots[row : row + 1], lengths=case.lengths[row : row + 1], new=[1],
            query_starts=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        )  # fmt: skip
        mine = q[token : token + 1].contiguous()
        spread_out = attend(alone, mine, **limits)
        assert torch.equal(spread_out[0], out[token])
        with monkeypatch.context() as patch:
            patch.setattr(invariant_attention, "PROGRAMS", 0)
            assert torch.equal(attend(alone, mine, **limits), spread_out)


LINEAR = dict.fromkeys(("x", "weight", "bias", "residual", "out"), "*bf16") | {
    "partials": "*fp32", "counters": "*i32", "num_rows": "i32", "num_out": "i32",
}  # fmt: skip
LINEAR_CONSTANTS = {
    "INNER": 4096, "PIECE": 1024, "PIECES": 4, "GROUP": 8, "KIND": 1, "BIAS": True, "RESIDUAL": True, "STAGES": 3,
    "BLOCK_IN": 64,
}  # fmt: skip
ATTENTION = (
    dict.fromkeys(("q", "out", "k_pages", "v_pages", "sinks"), "*bf16")
    | dict.fromkeys(("page_table", "slots", "query_starts", "lengths", "tiles", "counters"), "*i32")
    | dict.fromkeys(("table_stride", "most_chunks"), "i32")
    | dict.fromkeys(("factor", "cap", "v_scale"), "fp32")
    | {"partials": "*fp32"}
)
ATTENTION_CONSTANTS = {
    "NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD": 128, "BLOCK_H": 128, "BLOCK_M": 64, "BLOCK_C": 64, "CHUNK": 512,
    "Q_TILE": 16, "PAGE": 64, "WINDOW": 0, "CAP": False, "SINKS": True, "STAGES": 3, "FP16": False,
}  # fmt: skip


def test_they_compile_for_both_architectures() -> None:
    jobs = []
    for arch in (80, 90):
        more = {"DEPENDENT": arch >= 90}
        few = LINEAR_CONSTANTS | more | {"APART": True, "BLOCK_OUT": 64, "BLOCK_ROWS": 16}
        many = LINEAR_CONSTANTS | more | {"APART": False, "BLOCK_OUT": 64, "BLOCK_ROWS": 128}
        options = {"num_warps": 4, "launch_pdl": arch >= 90, "enable_fp_fusion": False}
        jobs.append(("cuda_kernels.invariant_linear", "product_kernel", LINEAR, few, arch, options))
        jobs.append(("cuda_kernels.invariant_linear", "product_kernel", LINEAR, many, arch, options | {"num_warps": 8}))
        for spread in (True, False):
            constants = ATTENTION_CONSTANTS | {"SPREAD": spread}
            options = {"num_warps": 4, "enable_fp_fusion": False}
            jobs.append(("cuda_kernels.invariant_attention", "invariant_kernel", ATTENTION, constants, arch, options))
    for job, made in zip(jobs, compile_kernels(jobs), strict=True):
        assert ("wgmma" in str(made["ptx"])) == (job[4] == 90)
        assert "fma.rn.f32" not in str(made["ptx"])  # no sum is fused in one variant and not in another
