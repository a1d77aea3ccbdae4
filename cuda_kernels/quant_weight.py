"""A weight kept in few bits: plain tensors and how to read them. What `dispatch.linear` takes beside a plain [O, I].

Made by backends/torch/weights.py at load, read by the quant_* kernels and by quant_reference. Never changed afterwards.
The weight that is meant, f32 [O, I], is
    fp8, int8   data * scale, the scale of the row ([O]) or of the 128 x 128 block
    w4          (nibble - zero) * scale, zero and scale of the row and the group of inputs
and a product is x @ weight.T, where the scheme rounds x too: `act` says how.
Letters: T tokens · I in · O out · G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK = 128  # rows and columns of a block with one scale; the last ones may be smaller
NIBBLES = 8  # in an int32 of w4

Scheme = Literal["fp8", "fp8_block", "int8", "w4"]
Act = Literal["none", "token", "block", "static"]
"""How x is rounded to the weight's number format before the product:
none    not at all: weights are made x's dtype on the way ("w4" always, fp8 and int8 sometimes)
token   each row by amax / limit of the row, limit 448 for fp8, 127 for int8
block   each row by amax / 448 of each BLOCK of its inputs ("fp8_block" only)
static  all by act_scale, made from calibration
"""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantWeight:
    """One weight [O, I]. All tensors are contiguous and on one device."""

    scheme: Scheme
    act: Act
    data: Tensor
    # fp8, fp8_block: float8_e4m3fn [O, I]; int8: int8 [O, I];
    # w4: i32 [O, I / 8], eight nibbles along I, the lowest index in the lowest bits, each 0..15
    scale: Tensor
    # fp8, int8: f32 [O]; fp8_block: f32 [ceil(O / 128), ceil(I / 128)]; w4: x's dtype [O, G], G = I / group
    zeros: Tensor | None = None  # w4: int8 [O, G], each 0..15; symmetric weights have 8 everywhere
    group: int = 0  # w4: inputs that share a scale and a zero, a multiple of 8 that divides I
    order: Tensor | None = None  # w4 with act order: i32 [I]; column j of data belongs to input order[j]
    act_scale: Tensor | None = None  # act "static": f32 [1]

    def __post_init__(self) -> None:
        rows, columns = self.shape
        stored = {"w4": torch.int32, "int8": torch.int8}.get(self.scheme, torch.float8_e4m3fn)
        shape = {
            "w4": (rows, columns // self.group if self.group else 0),
            "fp8_block": (-(-rows // BLOCK), -(-columns // BLOCK)),
        }.get(self.scheme, (rows,))
        if self.data.dtype != stored or tuple(self.scale.shape) != shape:
            raise ValueError(f"{self.scheme}: {self.data.dtype} {tuple(self.data.shape)}, scale {self.scale.shape}")
        if (self.scheme == "w4") != (self.zeros is not None) or (self.act == "static") != (self.act_scale is not None):
            raise ValueError(f"{self.scheme}, act {self.act}: zeros go with w4, act_scale with static")
        if self.act not in {"w4": ("none",), "fp8_block": ("none", "block")}.get(
            self.scheme, ("none", "token", "static")
        ):
            raise ValueError(f"{self.scheme}: act {self.act} does not belong to it")

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight that is meant."""
        rows, width = self.data.shape
        return rows, width * NIBBLES if self.scheme == "w4" else width

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def num_bytes(self) -> int:
        tensors = (self.data, self.scale, self.zeros, self.order, self.act_scale)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Rows of one product that are kept differently (q in 4 bits, k as it was; other input orders), top to bottom."""

    parts: tuple[QuantWeight | WideWeight | Tensor, ...]  # each [O_i, I]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of all parts together."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class WideWeight:
    """fp8 as a CPU multiplies it: its numbers in x's dtype ("block": times scale), x still rounded as `act` says."""

    act: Act
    data: Tensor  # [O, I] of x's dtype, as cpu_linear packs it
    scale: Tensor | None  # f32 [O]; act "block": None
    act_scale: Tensor | None  # f32 [1], act "static"
    shape: tuple[int, int]  # (O, I)


Weight = Tensor | QuantWeight | Parts | WideWeight
"""What a product takes as its weight."""
