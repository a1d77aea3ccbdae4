"""Small pieces of a decoder: norm, rotary turn, embedding, output head. Twin of jax_models/layers.py.

Called by attention.py, ffn.py and decoder.py. Sums and norms are float32 whatever the activations are.
Letters: T tokens · D width · N heads · H head size · V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cuda_kernels import dispatch
from cuda_kernels.quant_weight import Weight
from engine.specs.arch import ArchSpec
from torch_models.linear import linear_f32

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x / rms(x) * (weight + offset) over the last axis. x: [..., D]; weight: [D], or a head's own: [N, D]."""
    weight = weight.float() + offset if offset else weight.float()
    return dispatch.rms_norm(x.float(), weight, eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dims of each head, halves convention. x: [T, N, H]; cos, sin: f32 [T, R / 2]."""
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    wide = x[..., : 2 * half].float()
    first, second = wide[..., :half], wide[..., half:]
    turned = (wide.unflatten(-1, (2, half)) * cos[:, :, None]).flatten(-2)
    turned[..., :half].addcmul_(second, sin, value=-1)
    turned[..., half:].addcmul_(first, sin)
    turned = turned.to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)


def embed(token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
    """Rows of the table, times scale rounded to the table's dtype. token_ids: i64 [T] in [0, V); table: [V, D]."""
    rows = functional.embedding(token_ids, table)
    return rows if scale == 1.0 else rows * float(torch.tensor(scale, dtype=table.dtype))


def head(hidden: Tensor, table: Weight, spec: ArchSpec) -> Tensor:
    """Logits f32 [T, V]. hidden: [T, D], already normed; table: [V, D]."""
    logits = linear_f32(hidden, table)
    if spec.logit_scale != 1.0:
        logits = logits * spec.logit_scale
    if spec.logit_cap is not None:
        logits = spec.logit_cap * torch.tanh(logits / spec.logit_cap)
    return logits
