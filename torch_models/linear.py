"""Matrix products against [out, in] weights, plain or in few bits. Twin of jax_models/linear.py.

Letters: T tokens · I in · O out.
"""

from __future__ import annotations

from torch import Tensor

from cuda_kernels import dispatch
from cuda_kernels.quant_weight import Weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, of x's dtype. x: [T, I]; weight: [O, I]; bias: [O]."""
    return dispatch.linear(x, weight, bias)


def linear_f32(x: Tensor, weight: Weight) -> Tensor:
    """x @ weight.T, f32 [T, O]. x: [T, I]; weight: [O, I]. Sums are float32, the product is rounded to x's dtype."""
    return dispatch.linear(x, weight).float()
