"""Products with weights in few bits on a GPU: inputs made ready in one launch, then the product, at memory bandwidth.

Called by dispatch.py and by torch_models/fused.py, which give the norm in front, the gate, or the residual behind. Few
rows take our kernels; many take cuBLAS where it can multiply the form: e4m3 by e4m3 (into bfloat16), and what is not
rounded, after the weight was turned back. Sums are float32 (of int8 exact). Needs triton; the numbers are those of
quant_reference.py. Letters: T rows · I in · O out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from torch.nn import functional

from cuda_kernels import quant_reference
from cuda_kernels.fused import launch_options
from cuda_kernels.quant_kernels import BLOCKS, FIXED, NONE, TOKEN, dequantise_kernel, prepare_kernel, product_kernel
from cuda_kernels.quant_weight import BLOCK, QuantWeight
from cuda_kernels.small_linear import multiprocessors, resting_counters
from cuda_kernels.small_linear_kernels import ACTIVATIONS

MODES = {"none": NONE, "token": TOKEN, "static": FIXED, "block": BLOCKS}
MOST_ROWS = 128  # of a program; more rows take more programs
TILE = 16  # int32 of a row of 4-bit numbers: 128 inputs
LIBRARY_MULTIPLE = 16  # inputs and outputs of cuBLAS's e4m3 product
Norm = tuple[Tensor, float, float]
"""norm weight f32 [I], eps, offset"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    block_in: int  # numbers of a row, or int32 with nibbles
    block_out: int
    splits: int
    stages: int
    warps: int
    native: bool = False  # e4m3 by e4m3 without a turn to float16


def linear(
    x: Tensor,
    weight: QuantWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str = "",
    plan: Plan | None = None,
) -> Tensor:
    """residual + rms_norm(x) @ weight.T + bias, or act(gate) * up in the place of the norm. -> [T, O] of x's dtype.

    x: [T, I], with an activation [T, 2 I]: gate, then up; bias: [O]; residual: [T, O].
    """
    rows, (outputs, inner) = x.shape[0], weight.shape
    if x.shape[1] != inner * (2 if activation else 1) or (norm is not None and activation):
        raise ValueError(f"x {tuple(x.shape)}, weight {weight.shape}, activation {activation!r}")
    if not rows:
        return x.new_empty(0, outputs)
    codes, scales = prepare(x, weight, norm, activation)
    if plan is None and (rows > MOST_ROWS or not has_tiles(weight)):
        out = library(codes, scales, weight, x.dtype)
        if out is not None:
            out = out if bias is None else out.add_(bias)
            return out if residual is None else out.add_(residual)
    return product(codes, scales, weight, x.dtype, bias, residual, plan or plan_of(rows, weight, x.device))


def prepare(x: Tensor, weight: QuantWeight, norm: Norm | None = None, activation: str = "") -> tuple[Tensor, Tensor]:
    """(what `product` takes as x, its scales). Without a norm, a gate and rounding x is taken as it is."""
    rows, inner = x.shape[0], weight.shape[1]
    mode = MODES[weight.act]
    x = x.contiguous()
    if not (norm or activation or mode or weight.order is not None):
        return x, x
    dtype = x.dtype if mode == NONE else weight.data.dtype
    out = torch.empty(rows, inner, dtype=dtype, device=x.device)
    scales = out
    if mode != NONE:
        shape = (rows,) if mode in (TOKEN, FIXED) else (rows, -(-inner // BLOCK))
        scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    fixed = weight.act_scale if weight.act_scale is not None else out
    norm_weight, eps, offset = norm or (x, 0.0, 0.0)
    prepare_kernel[(rows,)](
        x, norm_weight, weight.order if weight.order is not None else x, fixed, out, scales, eps, offset,
        INNER=inner, BLOCK_IN=max(triton.next_power_of_2(inner), BLOCK), NORM=norm is not None,
        KIND=ACTIVATIONS[activation], MODE=mode, FP8=dtype == torch.float8_e4m3fn,
        ORDER=weight.order is not None, **launch_options(x, 8 if inner > 4096 else 4),
    )  # fmt: skip
    return out, scales


def product(
    x: Tensor,
    scales: Tensor,
    weight: QuantWeight,
    dtype: torch.dtype,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> Tensor:
    """x @ weight.T with what belongs to it, [T, O] of `dtype`. x, scales: of `prepare`."""
    rows, (outputs, inner) = x.shape[0], weight.shape
    block_rows = min(max(triton.next_power_of_2(rows), 8), MOST_ROWS)
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    grid = (triton.cdiv(outputs, plan.block_out), plan.splits, triton.cdiv(rows, block_rows))
    partials = counters = out
    if plan.splits > 1:
        size = grid[0] * grid[1] * grid[2] * block_rows * (plan.block_out + 1)
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = resting_counters(x.device)
    product_kernel[grid](
        x, scales, weight.data, weight.scale, weight.zeros if weight.zeros is not None else x,
        bias if bias is not None else x, residual.contiguous() if residual is not None else x,
        out, partials, counters, rows, outputs,
        INNER=inner, GROUP=weight.group, MODE=MODES[weight.act], SQUARES=weight.scheme == "fp8_block",
        BLOCK_IN=plan.block_in, BLOCK_OUT=plan.block_out, BLOCK_ROWS=block_rows, SPLITS=plan.splits,
        STAGES=plan.stages, NATIVE=plan.native,
        BIAS=bias is not None, RESIDUAL=residual is not None, **launch_options(x, plan.warps),
    )  # fmt: skip
    return out


def plan_of(rows: int, weight: QuantWeight, device: torch.device) -> Plan:
    """Tiles that keep weights in flight on every multiprocessor, or tensor cores busy where rows are many.

    More than MOST_ROWS rows are one class: nothing else is compiled for another number of them.
    """
    plan = tiles_of(rows, weight, device)
    blocks = triton.cdiv(weight.data.shape[1], plan.block_in)
    tiles = triton.cdiv(weight.shape[0], plan.block_out)
    splits = plan.splits
    while rows <= MOST_ROWS and 2 * splits * tiles <= 2 * multiprocessors(device) and 4 * splits <= blocks:
        splits *= 2
    return replace(plan, splits=splits)


def tiles_of(rows: int, weight: QuantWeight, device: torch.device) -> Plan:
    """The plan of a weight with enough tiles for the whole chip; as measured on an H200, 8B shapes."""
    if weight.scheme == "w4":
        return Plan(block_in=TILE, block_out=64, splits=2 if 8 < rows <= 32 else 1, stages=4, warps=4)
    rounded_fp8 = weight.scheme.startswith("fp8") and weight.act != "none"
    native = rounded_fp8 and rows > 8 and has_wide_fp8(device)
    if rows > 64:
        return Plan(block_in=BLOCK, block_out=128, splits=1, stages=4, warps=8, native=native)
    block_out, stages = 64, 4
    if native and weight.scheme == "fp8":
        stages = 6
    elif native and rows > 16:
        block_out = 128
    elif rows > 8 and not native and weight.scheme != "int8":  # turning numbers costs more than streaming them
        block_out = 32
    return Plan(block_in=BLOCK, block_out=block_out, splits=1, stages=stages, warps=4, native=native)


def has_tiles(weight: QuantWeight) -> bool:
    """Whether product_kernel's tiles are of whole groups, or groups of whole tiles."""
    group = weight.group
    return group == 0 or group % (8 * TILE) == 0 or (group >= 16 and group & (group - 1) == 0)


def library(x: Tensor, scales: Tensor, weight: QuantWeight, dtype: torch.dtype) -> Tensor | None:
    """The product of many rows by cuBLAS, [T, O], None where it cannot. x, scales: of `prepare`."""
    outputs, inner = weight.shape
    if weight.scheme == "w4":
        return functional.linear(x, dequantised(weight, dtype))
    if weight.act == "none":
        return functional.linear(x, quant_reference.dequantised(weight, dtype))
    whole = outputs % LIBRARY_MULTIPLE == 0 and inner % LIBRARY_MULTIPLE == 0
    if weight.scheme != "fp8" or dtype != torch.bfloat16 or not whole or not has_fp8(x.device):
        return None
    return torch._scaled_mm(x, weight.data.t(), scale_a=scales[:, None], scale_b=weight.scale[None], out_dtype=dtype)


def dequantised(weight: QuantWeight, dtype: torch.dtype) -> Tensor:
    """A weight of 4 bits as [O, I] of `dtype`, inputs in its own order, as `prepare` lays them."""
    outputs, inner = weight.shape
    out = torch.empty(outputs, inner, dtype=dtype, device=weight.data.device)
    width = inner // 8
    block = min(triton.next_power_of_2(width), 512)
    dequantise_kernel[(outputs, triton.cdiv(width, block))](
        weight.data, weight.scale, weight.zeros, out, INNER=inner, GROUP=weight.group, BLOCK_IN=block, num_warps=4
    )
    return out


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether the chip's tensor cores take e4m3 (sm_89 and up)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def has_wide_fp8(device: torch.device) -> bool:
    """Whether tiles of e4m3 are multiplied as they are, by warp groups (sm_90)."""
    return has_fp8(device) and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def takes(scheme: str, device: torch.device) -> bool:
    """Whether these kernels run a scheme here: triton has no e4m3 below sm_89."""
    return not scheme.startswith("fp8") or device.type != "cuda" or has_fp8(device)
