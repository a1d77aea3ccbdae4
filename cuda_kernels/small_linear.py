"""Linear layers of a decode step: norm, product, gate and residual of few rows in one launch, at memory bandwidth.

Called by torch_models/fused.py. The table of small_linear_plan.py picks the kernel; many rows, and shapes where cuBLAS
measured faster, take cuBLAS between a norm and a gate kernel. Sums are f32; nothing is allocated but outputs and, for
split products, their partial sums. A row's last bits may differ between calls of different numbers of rows, since the
table may choose another order of sums; invariant_linear.py has products for which they may not. Needs triton.
Letters: T rows · I in · O out · F gated width · V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional

from cuda_kernels import slab_linear
from cuda_kernels.fused import gated, launch_options, rms_norm
from cuda_kernels.small_linear_kernels import ACTIVATIONS, tile_kernel, vector_kernel
from cuda_kernels.small_linear_plan import LIBRARY, SLAB, Plan, plan_of

LEAST_ROWS = 16  # of a tile kernel's program: a decode step of eight rows took 4.36 ms with 16 and 4.61 ms with 8
MOST_ROWS = 128  # of a tile kernel's program; more rows take more programs
MOST_INNER = 32768  # of the vector kernel, which holds a row in registers
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_SLAB_ROWS = 2  # of one row the vector kernel is as fast
COUNTERS = 1 << 14  # tiles of a split product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, plan: Plan | None = None) -> Tensor:
    """x @ weight.T + bias. x: [T, I]; weight: [O, I]; bias: [O] -> [T, O]."""
    plan = plan or choose(x, weight)
    if plan.kernel == "library":
        return functional.linear(x, weight, bias)
    return product(x, weight, bias, plan)


def linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """residual + x @ weight.T + bias. x: [T, I]; weight: [O, I]; bias: [O]; residual: [T, O] -> [T, O].

    The residual may be overwritten with the sum: it is the caller's no more.
    """
    plan = plan or choose(x, weight)
    if plan.kernel == "library":
        out = residual.addmm_(x, weight.t())  # in place: another output would first be filled with the residual
        return out if bias is None else out.add_(bias)
    return product(x, weight, bias, plan, residual=residual)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    offset: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """rms_norm(x) @ weight.T + bias. x: [T, I]; norm_weight: f32 [I]; weight: [O, I]; bias: [O] -> [T, O]."""
    plan = plan or choose(x, weight, norm=True)
    if plan.kernel == "library":
        return functional.linear(rms_norm(x, norm_weight, eps, offset), weight, bias)
    return product(x, weight, bias, plan, norm=(norm_weight, eps, offset))


def norm_gated(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    offset: float,
    gate_up: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    *,
    plan: Plan | None = None,
) -> Tensor:
    """act(gate) * up of rms_norm(x). x: [T, I]; norm_weight: f32 [I]; gate_up: [2F, I]; bias: [2F] -> [T, F]."""
    if activation not in ACTIVATIONS or not activation:
        raise ValueError(f"activation {activation!r}: not one of {[name for name in ACTIVATIONS if name]}")
    plan = plan or choose(x, gate_up, activation, norm=True)
    if plan.kernel == "library":
        return gated(functional.linear(rms_norm(x, norm_weight, eps, offset), gate_up, bias), activation)
    return product(x, gate_up, bias, plan, norm=(norm_weight, eps, offset), activation=activation)


def head(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    offset: float,
    weight: Tensor,
    out: Tensor | None = None,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """Logits of rms_norm(x), f32 [T, V]. x: [T, I]; norm_weight: f32 [I]; weight: [V, I]; out: f32 [T, V] to write."""
    rows, width = x.shape[0], weight.shape[0]
    if out is None:
        out = torch.empty(rows, width, dtype=torch.float32, device=x.device)
    if out.shape != (rows, width) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not hold f32 logits [{rows}, {width}]")
    plan = plan or from_table(x, weight)
    if plan.kernel != "library":
        return product(x, weight, None, plan, norm=(norm_weight, eps, offset), out=out)
    normed = rms_norm(x, norm_weight, eps, offset)
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(normed, weight.t(), out_dtype=torch.float32, out=out)
    return out.copy_(functional.linear(normed, weight))


def supported(rows: int, weight_shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the kernels here can run the product; what they cannot is left to cuBLAS by the functions above."""
    return dtype in DTYPES and 0 < rows <= MOST_ROWS and weight_shape[0] < COUNTERS * 16 and weight_shape[1] >= 16


def prefers(rows: int, weight_shape: tuple[int, int], dtype: torch.dtype, gated: bool = False) -> bool:
    """Whether the table takes the kernels here rather than cuBLAS."""
    known = supported(rows, weight_shape, dtype) and dtype != torch.float32
    return known and plan_of(rows, *weight_shape, gated).kernel != "library"


def choose(x: Tensor, weight: Tensor, activation: str = "", *, norm: bool = False) -> Plan:
    """The plan of a product. x: [T, I]; weight: [O, I]."""
    rows, inner = x.shape
    if weight.dim() != 2 or weight.shape[1] != inner or weight.dtype != x.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype}")
    if rows >= LEAST_SLAB_ROWS and slab_linear.chosen(x, weight, activation, norm) is not None:
        return SLAB
    return from_table(x, weight, activation != "")


def from_table(x: Tensor, weight: Tensor, gated: bool = False) -> Plan:
    shape = (weight.shape[0], weight.shape[1])
    return plan_of(len(x), *shape, gated) if prefers(len(x), shape, x.dtype, gated) else LIBRARY


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    *,
    norm: tuple[Tensor, float, float] | None = None,
    activation: str = "",
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run a plan. x: [T, I]; weight: [O, I] -> [T, O], or [T, F] with an activation. norm: weight, eps, offset."""
    rows = x.shape[0]
    num_out = weight.shape[0] // 2 if activation else weight.shape[0]
    if not weight.is_contiguous() or (residual is not None and residual.shape != (rows, num_out)):
        raise ValueError(f"weight {tuple(weight.shape)} must be contiguous, a residual [{rows}, {num_out}]")
    if norm is not None and norm_is_apart(plan, x.dtype):
        x, norm = rms_norm(x, *norm), None
    x = x.contiguous()
    if plan.kernel == "slab":
        residual = None if residual is None else residual.contiguous()
        return slab_linear.product(x, weight, bias, residual, norm, activation)
    if out is None:
        out = torch.empty(rows, num_out, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    norm_weight, eps, offset = norm if norm is not None else (x, 0.0, 0.0)
    unused = x  # stands for what the product has not
    launch = Launch(
        inputs=(x, norm_weight, weight, unused if bias is None else bias,
                unused if residual is None else residual.contiguous()),
        out=out,
        plan=plan,
        numbers=(num_out, eps, offset),
        options={"NORM": norm is not None, "KIND": ACTIVATIONS[activation], "BIAS": bias is not None,
                 "RESIDUAL": residual is not None, **launch_options(x, plan.warps)},
    )  # fmt: skip
    (launch_vector if plan.kernel == "vector" else launch_tiles)(launch)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A product's arguments, in the order of the kernels."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x, norm weight, weight, bias, residual
    out: Tensor
    numbers: tuple[int, float, float]  # rows of out, eps, offset
    plan: Plan
    options: dict[str, int | bool]


def norm_is_apart(plan: Plan, dtype: torch.dtype) -> bool:
    """The tile kernel norms behind the product; float16 could overflow there."""
    return plan.kernel == "tile" and (plan.norm_apart or dtype == torch.float16)


def launch_vector(launch: Launch) -> None:
    x, plan = launch.inputs[0], launch.plan
    if x.shape[0] != 1:
        raise ValueError(f"the vector kernel takes one row, not {x.shape[0]}")
    inner = x.shape[1]
    tiles = triton.cdiv(launch.numbers[0], plan.block_out)
    programs = min(tiles, plan.programs * multiprocessors(x.device))
    vector_kernel[(programs,)](
        *launch.inputs, launch.out, *launch.numbers,
        INNER=inner, BLOCK_IN=triton.next_power_of_2(inner), BLOCK_OUT=plan.block_out,
        TRIPS=triton.cdiv(tiles, programs), STAGES=plan.stages, REQUEST=plan.request,
        **launch.options,
    )  # fmt: skip


def launch_tiles(launch: Launch) -> None:
    x, plan = launch.inputs[0], launch.plan
    rows, inner = x.shape
    block_rows = min(max(triton.next_power_of_2(rows), LEAST_ROWS), MOST_ROWS)
    splits = max(1, min(plan.splits, triton.cdiv(inner, plan.block_in)))
    grid = (triton.cdiv(launch.numbers[0], plan.block_out), splits, triton.cdiv(rows, block_rows))
    partials = counters = launch.out
    if splits > 1:
        parts = 2 if launch.options["KIND"] else 1
        size = grid[0] * grid[1] * grid[2] * block_rows * (parts * plan.block_out + 1)
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = resting_counters(x.device)
    tile_kernel[grid](
        *launch.inputs, launch.out, partials, counters, rows, *launch.numbers,
        INNER=inner, BLOCK_IN=plan.block_in, BLOCK_OUT=plan.block_out, BLOCK_ROWS=block_rows, SPLITS=splits,
        STAGES=plan.stages, REQUEST=plan.request, **launch.options,
    )  # fmt: skip


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def resting_counters(device: torch.device) -> Tensor:
    """i32 [COUNTERS], all zero between kernels: the last program of a tile clears its counter."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a split product once before capturing it: its counters must not be of the graph")
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
