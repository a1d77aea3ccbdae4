"""Products on a CPU, each in the form that it is fast at. Called by dispatch.py alone.

Measured, a 32 M Llama's products of one step, 2 cores (AVX-512, AMX): bfloat16 of 1 to 16 rows takes 2.7 to 3.1 ms
plain and 1.9 ms against weights packed once by oneDNN, which prefill of 1000 tokens likes too (32.8 -> 30.0 ms); where
a weight cannot be packed (a tied head is an embedding table as well), (w @ x.T).T of 2 to 24 rows beats x @ w.T.
float32 of 8 rows takes 8.1 ms in one product a weight and 6.4 ms as a batch of products of 128 outputs: the BLAS loses
its way where outputs outnumber rows by far. Packed float32 takes 6.1 ms of 8 rows, but 3.1 for 2.6 of one row.
Letters: T tokens · I in · O out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

FLOAT32_ROWS = range(5, 14)
FLOAT32_PIECE = 128  # outputs of one product of a batch
FLOAT32_LARGE = 1 << 20  # fewest numbers of a weight that gain; smaller ones are up to 1.6 times faster in one product
BFLOAT16_ROWS = range(2, 25)
PACKED_ROWS = 16  # the row count that a packed weight is laid out for; measured to be as good for 1 and for 1000


def pack(weight: Tensor) -> Tensor:
    """weight [O, I] in the form that linear likes best: bfloat16 in oneDNN's layout where the CPU multiplies it."""
    if weight.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias. x: [T, I]; weight: [O, I], plain or packed; bias: [O] -> [T, O], contiguous."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    rows, (outputs, inputs) = x.shape[0], weight.shape
    large = outputs * inputs >= FLOAT32_LARGE and outputs % FLOAT32_PIECE == 0
    if large and rows in FLOAT32_ROWS and x.dtype == torch.float32:
        pieces = weight.view(-1, FLOAT32_PIECE, inputs).transpose(1, 2)  # [O / 128, I, 128]
        out = torch.bmm(x.expand(len(pieces), rows, inputs), pieces).transpose(0, 1).reshape(rows, outputs)
    elif rows in BFLOAT16_ROWS and x.dtype == torch.bfloat16:
        out = torch.mm(weight, x.t()).t().contiguous()
    else:
        return functional.linear(x, weight, bias)
    return out if bias is None else out + bias
