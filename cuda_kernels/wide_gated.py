"""Gate and up of 128 rows with the activation inside: one launch in the place of a cuBLAS product and a gate.

A program multiplies all rows with a tile of gate rows and the tile of up rows that belongs to it, brought by the bulk
copy engine as one tile of [2, F, I]. Only where there are more such tiles than multiprocessors: else cuBLAS, which cuts
otherwise, is faster (28672 x 4096 on an H200: 64.7 us, cuBLAS and gate 71.2; 6144 x 1024: 8.1 and 7.3).
Called by torch_models/fused_products.py. Needs a GPU of sm_90.
Letters: T rows · I in · F gated width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cuda_kernels.fused import can_overlap, launch_options
from cuda_kernels.small_linear import multiprocessors
from cuda_kernels.small_linear_kernels import ACTIVATIONS, activate, arrive

ROWS = 128  # of a tile. Rows beyond the end cost the copy engine more than those that are there: 65 take 92 us, 128 65
TILE, STEP = 64, 64  # outputs of a program, inputs of a stage


def takes(rows: int, weight: Tensor) -> bool:
    """Whether `multiply` takes a product of so many rows. weight: [2F, I]."""
    width, inner = weight.shape[0] // 2, weight.shape[1]
    whole = width % TILE == 0 and inner % STEP == 0 and weight.dtype in (torch.bfloat16, torch.float16)
    if not whole or rows != ROWS or not can_overlap(weight.device):
        return False
    return width // TILE > multiprocessors(weight.device)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(gate) * up, rounded once, of x @ weight.T + bias. x: [T, I]; weight: [2F, I]; bias: [2F] -> [T, F]."""
    (rows, inner), width = x.shape, weight.shape[0] // 2
    x, out = x.contiguous(), torch.empty(rows, width, dtype=x.dtype, device=x.device)
    wide_kernel[(width // TILE, triton.cdiv(rows, ROWS))](
        TensorDescriptor.from_tensor(x, [ROWS, STEP]),
        TensorDescriptor.from_tensor(weight.view(2, width, inner), [2, TILE, STEP]),
        TensorDescriptor.from_tensor(out, [ROWS, TILE]),
        bias, WIDTH=width, INNER=inner, BLOCK_ROWS=ROWS, BLOCK_OUT=TILE, BLOCK_IN=STEP,
        KIND=ACTIVATIONS[activation], **launch_options(x, 4),
    )  # fmt: skip
    return out


@triton.jit
def wide_kernel(
    x,  # descriptor of [T, I]
    tiles,  # descriptor of the weight as [2, F, I]
    out,  # descriptor of [T, F]
    bias,  # [2F] or None
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    KIND: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    first, row = tl.program_id(0) * BLOCK_OUT, tl.program_id(1) * BLOCK_ROWS
    arrive(DEPENDENT)
    sums = tl.zeros((BLOCK_ROWS, 2 * BLOCK_OUT), tl.float32)
    for at in tl.range(0, INNER, BLOCK_IN, num_stages=3):
        pair = tl.reshape(tiles.load([0, first, at]), (2 * BLOCK_OUT, BLOCK_IN))
        sums = tl.dot(x.load([row, at]), tl.trans(pair), sums, input_precision="ieee")
    gate, up = tl.split(tl.permute(tl.reshape(sums, (BLOCK_ROWS, 2, BLOCK_OUT)), (0, 2, 1)))
    if bias is not None:
        place = first + tl.arange(0, BLOCK_OUT)
        gate += tl.load(bias + place).to(tl.float32)[None, :]
        up += tl.load(bias + WIDTH + place).to(tl.float32)[None, :]
    out.store([row, first], (activate(gate, KIND) * up).to(out.dtype))
