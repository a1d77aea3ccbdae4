"""Products of many rows with few outputs: cut along the inner axis, the parts added by the launch that norms the sum.

Some hundred rows times a few thousand outputs are too few tiles for the chip, so cuBLAS cuts the inner axis itself and
adds the pieces in a kernel of its own; then comes our norm kernel, over the same values. Here the pieces are a batch of
products, and one launch adds them, the bias and the residual, and norms the result. Called by torch_models/fused.py.
Letters: T rows · I in · O out, the width · P pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_kernels.fused import launch_options
from cuda_kernels.small_linear import multiprocessors
from cuda_kernels.small_linear_kernels import arrive

TILE = 128  # rows and outputs of a cuBLAS tile
LEAST_ROWS, MOST_ROWS = 65, 256  # measured on an H200, as are the next two
NARROW, LEAST_NARROW_ROWS = 2048, 33  # outputs so few that cutting pays earlier
PIECES = 2  # four were no faster


@dataclass(frozen=True, slots=True)
class Sum:
    """residual + bias + the sum of the pieces: a residual stream that nobody has added up yet."""

    pieces: Tensor  # f32 [P, T, O]
    residual: Tensor  # [T, O]
    bias: Tensor | None  # [O]

    def normed(self, norm_weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        """(the stream, its norm as fused.rms_norm gives it), [T, O] each of the residual's dtype."""
        return add_up(self, (norm_weight, eps, offset))

    def total(self) -> Tensor:
        return add_up(self, None)[0]


def is_cut(rows: int, outputs: int, inner: int, device: torch.device) -> bool:
    """Whether a product is cut: its tiles are fewer than half of what the chip runs at once."""
    tiles = -(-rows // TILE) * -(-outputs // TILE)
    least = LEAST_NARROW_ROWS if outputs <= NARROW else LEAST_ROWS
    return least <= rows <= MOST_ROWS and inner % (32 * PIECES) == 0 and PIECES * tiles <= multiprocessors(device)


def most_bytes(rows: int, outputs: int, sms: int) -> int:
    """Of the pieces of a product of up to so many rows."""
    return 4 * PIECES * min(rows * outputs, TILE * TILE * (sms // PIECES))


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Sum:
    """residual + x @ weight.T + bias. x: [T, I]; weight: [O, I]; bias: [O]; residual: [T, O]."""
    (rows, inner), outputs = x.shape, len(weight)
    first = x.view(rows, PIECES, inner // PIECES).transpose(0, 1)
    second = weight.view(outputs, PIECES, inner // PIECES).permute(1, 2, 0)
    if x.is_cuda and x.dtype != torch.float32:
        parts = torch.bmm(first, second, out_dtype=torch.float32)
    else:
        parts = torch.bmm(first.float(), second.float())
    return Sum(parts, residual, bias)


def add_up(parts: Sum, norm: tuple[Tensor, float, float] | None) -> tuple[Tensor, Tensor]:
    """norm: weight f32 [O], eps, offset; without one the second result is the first."""
    residual, (_, rows, width) = parts.residual.contiguous(), parts.pieces.shape
    total = torch.empty_like(residual)
    normed = torch.empty_like(residual) if norm is not None else total
    weight, eps, offset = norm if norm is not None else (residual, 0.0, 0.0)
    block = triton.next_power_of_2(width)
    add_kernel[(rows,)](
        parts.pieces, residual, parts.bias, weight, total, normed, rows, eps, offset,
        COUNT=PIECES, INNER=width, BLOCK=block, NORM=norm is not None,
        **launch_options(residual, 8 if block >= 4096 else 4),
    )  # fmt: skip
    return total, normed


@triton.jit(do_not_specialize=["num_rows"])
def add_kernel(
    pieces,  # f32 [P, T, O]
    residual,  # [T, O]
    bias,  # [O] or None
    norm_weight,  # f32 [O]
    total,  # [T, O]
    normed,  # [T, O]
    num_rows,
    eps,
    offset,
    COUNT: tl.constexpr,  # P
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= O
    NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A row a program."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BLOCK)
    inside = inner < INNER
    gain = tl.zeros((BLOCK,), tl.float32)
    if NORM:
        gain = tl.load(norm_weight + inner, mask=inside, other=0.0).to(tl.float32) + offset
    arrive(DEPENDENT)
    values = tl.zeros((BLOCK,), tl.float32)
    for piece in tl.static_range(COUNT):
        place = (piece * num_rows + row) * INNER
        values += tl.load(pieces + place + inner, mask=inside, other=0.0)
    if bias is not None:
        values += tl.load(bias + inner, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(residual + row * INNER + inner, mask=inside, other=0.0).to(tl.float32)
    stream = values.to(total.dtype.element_ty)
    tl.store(total + row * INNER + inner, stream, mask=inside)
    if NORM:
        values = stream.to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 0) / INNER + eps)
        tl.store(normed + row * INNER + inner, (values * scale * gain).to(normed.dtype.element_ty), mask=inside)
