"""Products of few rows on a CPU, each in the form that the BLAS is fast at. Called by dispatch.py alone.

Measured on a Zen 4 of 2 cores, a whole 32 M Llama a step: float32 of 4 to 12 rows takes 9.3 ms in one product a weight
and 7.6 ms in products of 512 outputs (the BLAS loses its way where outputs outnumber rows by far); bfloat16 of 2 to
24 rows takes 5.1 ms as x @ w.T and 4.0 ms as (w @ x.T).T. Other sizes are best as they are.
Letters: T tokens · I in · O out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

FLOAT32_ROWS = range(4, 13)
FLOAT32_PIECE = 512  # outputs of one product
BFLOAT16_ROWS = range(2, 25)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias. x: [T, I]; weight: [O, I]; bias: [O] -> [T, O], contiguous."""
    if x.dtype == torch.float32 and x.shape[0] in FLOAT32_ROWS and weight.shape[0] >= 2 * FLOAT32_PIECE:
        out = torch.cat([functional.linear(x, piece) for piece in weight.split(FLOAT32_PIECE)], dim=1)
    elif x.dtype == torch.bfloat16 and x.shape[0] in BFLOAT16_ROWS:
        out = torch.mm(weight, x.t()).t().contiguous()
    else:
        return functional.linear(x, weight, bias)
    return out if bias is None else out + bias
