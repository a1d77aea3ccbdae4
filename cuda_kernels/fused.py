"""Elementwise passes of a GPU layer, each one read and one write: norm and gated activation.

Called by small_linear.py where a product does not do these itself, and by torch_models/fused.py. One program owns a row
(norm) or a piece of one (activation); sums are float32. The mathematics of torch_models/layers.py. Needs triton.
Letters: T tokens · I, D width · F ffn width.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_kernels.small_linear_kernels import ACTIVATIONS, activate, arrive

PIECE = 1024  # values of a gated row that one program makes


def rms_norm(x: Tensor, norm_weight: Tensor, eps: float, offset: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * (norm_weight + offset), of x's dtype. x: [T, D]; norm_weight: [D] -> [T, D]."""
    if x.dim() != 2 or norm_weight.shape != x.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} and norm_weight {tuple(norm_weight.shape)}: [T, D] and [D] are wanted")
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(x.shape[1])
    options = launch_options(x, 8 if block >= 4096 else 4)
    if x.shape[0]:
        norm_kernel[(x.shape[0],)](x, norm_weight, out, eps, offset, x.shape[1], block, **options)
    return out


def gated(pair: Tensor, activation: str) -> Tensor:
    """act(gate) * up, rounded once. pair: [T, 2F], gate then up -> [T, F]."""
    if pair.dim() != 2 or pair.shape[1] % 2:
        raise ValueError(f"gate and up {tuple(pair.shape)}: [T, 2F] is wanted")
    if activation not in ACTIVATIONS or not activation:
        raise ValueError(f"activation {activation!r}: not one of {[name for name in ACTIVATIONS if name]}")
    pair, (rows, width) = pair.contiguous(), (pair.shape[0], pair.shape[1] // 2)
    out = torch.empty(rows, width, dtype=pair.dtype, device=pair.device)
    if rows and width:
        grid = (rows, triton.cdiv(width, PIECE))
        gated_kernel[grid](pair, out, width, PIECE, ACTIVATIONS[activation], **launch_options(pair, 4))
    return out


def launch_options(x: Tensor, warps: int) -> dict[str, int | bool]:
    dependent = can_overlap(x.device)
    return {"DEPENDENT": dependent, "num_warps": warps, **({"launch_pdl": True} if dependent else {})}


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start while the one before still runs."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) and not interpreted


@triton.jit
def norm_kernel(x, norm_weight, out, eps, offset, INNER: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """A row a program. x, out: [T, I]; norm_weight: f32 [I]."""
    start = tl.program_id(0).to(tl.int64) * INNER
    inner = tl.arange(0, BLOCK)
    inside = inner < INNER
    gain = tl.load(norm_weight + inner, mask=inside, other=0.0).to(tl.float32) + offset
    arrive(DEPENDENT)
    row = tl.load(x + start + inner, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / INNER + eps)
    tl.store(out + start + inner, (row * scale * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(pair, out, num_out, BLOCK: tl.constexpr, KIND: tl.constexpr, DEPENDENT: tl.constexpr):
    """act(gate) * up. pair: [T, 2F]; out: [T, F]; num_out: F."""
    arrive(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_out
    gate = tl.load(pair + 2 * row * num_out + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pair + (2 * row + 1) * num_out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * num_out + at, (activate(gate, KIND) * up).to(out.dtype.element_ty), mask=inside)
