"""Products against weights in few bits in plain torch: what runs on a CPU, and what the GPU kernels are compared with.

Activations are rounded as the scheme says (quant_weight.Act) and sums are exact or float32, so that a kernel differs by
the order of its sums alone. Called by dispatch.py.
Letters: T tokens · I in · O out · G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from cuda_kernels.quant_weight import BLOCK, NIBBLES, QuantWeight, WideWeight

E4M3_MAX = 448.0
INT8_MAX = 127.0
CUBLAS_MULTIPLE, CUBLAS_ROWS = 8, 32  # its integer product takes multiples of 8, and more than 16 rows
SMALLEST = 1e-12  # a scale of a row of zeros: anything but 0


def linear(x: Tensor, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, of x's dtype. x: [T, I]; weight: [O, I]; bias: [O] -> [T, O]."""
    if weight.act == "none":
        return functional.linear(x, dequantised(weight, x.dtype), bias)
    if weight.act == "block":
        out = functional.linear(rounded_blocks(x), dequantised(weight, torch.float32))
    elif weight.scheme == "int8":
        codes, scale = rounded_int8(x, weight.act_scale)
        out = int_product(codes, weight.data) * scale * weight.scale
    else:
        codes, scale = rounded_fp8(x, weight.act_scale)
        out = functional.linear(codes.float(), weight.data.float()) * scale * weight.scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def rounded_fp8(x: Tensor, act_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x rounded per token, or by act_scale, f32 [1]: (e4m3 [T, I], scales, f32 [T, 1])."""
    scale = row_scale(x, E4M3_MAX, act_scale)
    return (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def rounded_int8(x: Tensor, act_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same to int8."""
    scale = row_scale(x, INT8_MAX, act_scale)
    return (x.float() / scale).nan_to_num_(0.0).round_().clamp_(-INT8_MAX - 1, INT8_MAX).to(torch.int8), scale


def row_scale(x: Tensor, limit: float, act_scale: Tensor | None) -> Tensor:
    """f32 [T, 1]: act_scale, or what makes the largest number of each row `limit`; NaN where a row is not finite.

    What is not finite must not become a number: so the product is NaN as well.
    """
    largest = x.abs().amax(dim=1, keepdim=True).float()
    scale = largest.clamp(min=SMALLEST) / limit if act_scale is None else act_scale.expand_as(largest)
    return torch.where(largest.isfinite(), scale, torch.nan)


def widened(weight: QuantWeight, dtype: torch.dtype, pack: Callable[[Tensor], Tensor]) -> Tensor | WideWeight:
    """fp8 and w4 as a CPU multiplies them best: measured, turning fp8 in each product takes 30 times the product.

    pack: what the library's layout needs of a weight [O, I] of `dtype`.
    """
    if weight.act == "none":
        return pack(dequantised(weight, dtype))
    data = dequantised(weight, dtype) if weight.act == "block" else weight.data.to(dtype)
    scale = None if weight.act == "block" else weight.scale
    return WideWeight(act=weight.act, data=pack(data), scale=scale, act_scale=weight.act_scale, shape=weight.shape)


def wide_input(x: Tensor, weight: WideWeight) -> tuple[Tensor, Tensor | None]:
    """What a product with weight.data takes, [T, I] of x's dtype, and what its result is multiplied with, [T, O]."""
    if weight.scale is None:
        return rounded_blocks(x).to(x.dtype), None
    codes, scale = rounded_fp8(x, weight.act_scale)
    return codes.to(x.dtype), scale * weight.scale


def rounded_blocks(x: Tensor) -> Tensor:
    """Act "block": x rounded to e4m3, each BLOCK of a row's inputs by a scale of its own, f32 [T, I]."""
    rows, inner = x.shape
    padded = functional.pad(x.float(), (0, -inner % BLOCK)).view(rows, -1, BLOCK)
    scale = padded.abs().amax(dim=2, keepdim=True).clamp(min=SMALLEST) / E4M3_MAX
    codes = (padded / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    return (codes * scale).view(rows, -1)[:, :inner]


def int_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T with exact sums, f32 [T, O]. x: int8 [T, I]; weight: int8 [O, I]."""
    rows, (outputs, inputs) = x.shape[0], weight.shape
    if not x.is_cuda:
        return torch._int_mm(x, weight.t()).float()
    if outputs % CUBLAS_MULTIPLE or inputs % CUBLAS_MULTIPLE:
        return functional.linear(x.double(), weight.double()).float()
    padded = functional.pad(x, (0, 0, 0, max(0, CUBLAS_ROWS - rows)))
    return torch._int_mm(padded, weight.t())[:rows].float()


def dequantised(weight: QuantWeight, dtype: torch.dtype) -> Tensor:
    """The weight that is meant, [O, I] of `dtype`, each number rounded once."""
    if weight.scheme == "fp8_block":
        rows, columns = weight.shape
        scale = weight.scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return (weight.data.float() * scale).to(dtype)
    if weight.scheme != "w4":
        return (weight.data.float() * weight.scale[:, None]).to(dtype)
    rows, columns = weight.shape
    codes = nibbles(weight.data).view(rows, -1, weight.group).float()  # [O, G, group]
    codes -= cast(Tensor, weight.zeros).float()[:, :, None]
    out = (codes * weight.scale.float()[:, :, None]).view(rows, columns).to(dtype)
    if weight.order is None:
        return out
    turned = torch.empty_like(out)
    turned[:, weight.order.long()] = out
    return turned


def nibbles(data: Tensor) -> Tensor:
    """u8 [O, I] of packed i32 [O, I / 8], which lie low bits first."""
    halves = data.view(torch.uint8)  # [O, I / 2]: two numbers a byte, the lower one first
    return torch.stack((halves & 0xF, halves >> 4), dim=-1).view(data.shape[0], data.shape[1] * NIBBLES)
