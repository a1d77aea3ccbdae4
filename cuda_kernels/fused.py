"""Elementwise passes of a GPU layer, each one read and one write: norms, residual sums, gated activations.

Called by torch_models/fused.py and where a product has too many rows to do these itself. One program owns a row (norms)
or a piece of one (activations); sums are float32. The mathematics of torch_models/layers.py. Needs triton.
Letters: T tokens · D width · F ffn width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_kernels.small_linear_kernels import ACTIVATIONS, activate

PIECE = 2048  # values of a gated row that one program makes


def rms_norm(x: Tensor, norm_weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * (norm_weight + offset), of x's dtype. x: [T, D]; norm_weight: [D] -> [T, D]."""
    check_rows(x, norm_weight)
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.shape[0]:
        norm_kernel[(x.shape[0],)](x, x, norm_weight, x, out, eps, offset, ADD=False, **blocks(x))
    return out


def add_norm(x: Tensor, mixed: Tensor, norm_weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(x + mixed, its rms_norm), of x's dtype. x, mixed: [T, D]; norm_weight: [D] -> [T, D] twice."""
    check_rows(x, norm_weight)
    if mixed.shape != x.shape or mixed.dtype != x.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and mixed {tuple(mixed.shape)} {mixed.dtype} cannot be added")
    x, mixed = x.contiguous(), mixed.contiguous()
    total, out = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    if x.shape[0]:
        norm_kernel[(x.shape[0],)](x, mixed, norm_weight, total, out, eps, offset, ADD=True, **blocks(x))
    return total, out


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, rounded once. gate_up: [T, 2F], gate then up -> [T, F]."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up {tuple(gate_up.shape)}: [T, 2F] is wanted")
    if activation not in ACTIVATIONS or not activation:
        raise ValueError(f"activation {activation!r}: not one of {[name for name in ACTIVATIONS if name]}")
    gate_up, (rows, width) = gate_up.contiguous(), gate_up.shape
    out = torch.empty(rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    if rows and width:
        pieces = triton.cdiv(width // 2, PIECE)
        gated_kernel[(rows * pieces,)](
            gate_up, out, WIDTH=width // 2, PIECES=pieces, BLOCK=PIECE, KIND=ACTIVATIONS[activation], num_warps=8
        )
    return out


def check_rows(x: Tensor, norm_weight: Tensor) -> None:
    if x.dim() != 2 or norm_weight.shape != x.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} and norm_weight {tuple(norm_weight.shape)}: [T, D] and [D] are wanted")


def blocks(x: Tensor) -> dict[str, int]:
    """How a row is laid over threads: 16 bytes and more each. x: [T, D]."""
    block = triton.next_power_of_2(x.shape[1])
    return {"WIDTH": x.shape[1], "BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


@triton.jit
def norm_kernel(
    x,  # [T, D]
    mixed,  # [T, D]
    weight,  # [D]
    total,  # [T, D]
    out,  # [T, D]
    eps,
    offset,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """total = x + mixed, out = its norm; without ADD the norm of x."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    values = tl.load(x + row + at, mask=inside, other=0.0)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
    if ADD:
        added = tl.load(mixed + row + at, mask=inside, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)  # the stream is kept rounded
        tl.store(total + row + at, values, mask=inside)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    tl.store(out + row + at, (wide * scale * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(
    gate_up,  # [T, 2F]
    out,  # [T, F]
    WIDTH: tl.constexpr,  # F
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // PIECES).to(tl.int64)
    at = program % PIECES * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, (activate(gate, KIND) * up).to(out.dtype.element_ty), mask=inside)
