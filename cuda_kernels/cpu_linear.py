"""Products on a CPU, each in the form that it is fast at. Called by dispatch.py alone.

Measured, all products of one step, 2 cores (AVX-512, AMX). A 32 M Llama in bfloat16: 1 to 16 rows take 2.7 to 3.1 ms
plain and 1.9 ms against weights packed once by oneDNN, which prefill of 1000 tokens likes too (32.8 -> 30.0 ms); where
a weight cannot be packed (a tied head is an embedding table as well), (w @ x.T).T of 2 to 24 rows beats x @ w.T.
In float32, plain and by our C++ kernel (csrc/cpu_linear.cc): 1 row 2.6 and 2.3 ms, 4 rows 4.6 and 2.7, 8 rows 6.1 and
3.6, 16 rows 8.6 and 7.8, 24 rows 10.8 and 10.0, 32 rows 11.4 and 13.1. A model of 7 M parameters: 1 row 0.56 and 0.63,
4 rows 0.76 and 0.71, 8 rows 1.02 and 0.92, 16 rows alike.
Letters: T tokens · I in · O out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cuda_kernels.cpu_library import library

OWN_ROWS = range(4, 17)  # float32 rows that our kernel takes of any weight
OWN_FEW = range(1, 4)  # and of a large one
OWN_LARGE = 1 << 19  # numbers of a large weight
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
    rows = len(x)
    if x.dtype == torch.float32 and (rows in OWN_ROWS or (rows in OWN_FEW and weight.numel() >= OWN_LARGE)):
        out = own(x, weight)
    elif rows in BFLOAT16_ROWS and x.dtype == torch.bfloat16:
        out = torch.mm(weight, x.t()).t().contiguous()
    else:
        return functional.linear(x, weight, bias)
    return out if bias is None else out + bias


def own(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T by our C++ kernel, by torch where it cannot run. x: f32 [T, I]; weight: f32 [O, I] -> f32 [T, O]."""
    loaded = library()
    if loaded is None or weight.dtype != torch.float32 or not (x.is_contiguous() and weight.is_contiguous()):
        return functional.linear(x, weight)
    (rows, inputs), outputs = x.shape, len(weight)
    if weight.shape[1] != inputs:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not belong together")
    out = torch.empty(rows, outputs)
    if not loaded.twinfer_linear(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, outputs, inputs):
        raise MemoryError(f"no memory to lay out {rows} rows of {inputs}")
    return out
