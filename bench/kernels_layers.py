"""The layers of a decode step without an engine: a graph over distinct weights and caches, share by share.

The 8B shape by default. Printed beside the whole are the products alone (cuBLAS), the attention alone and the
elementwise passes alone, each in a graph of its own; what is left is gaps and what kernels take from each other.
`python -m bench.kernels_layers [--rows 128 256] [--context 256]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bench.kernels_attention import DEVICE, paged, replay_us
from cuda_kernels import fused, small_linear
from cuda_kernels.attention_decode import decode_attention, make_workspace
from cuda_kernels.attention_items import make_items

EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder's sizes."""

    layers: int = 32
    width: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Of a layer."""

    qkv: Tensor  # [(N + 2K) * H, D]
    o: Tensor  # [D, N * H]
    gate_up: Tensor  # [2F, D]
    down: Tensor  # [D, F]
    norm: Tensor  # f32 [D]


def weight(out: int, inner: int) -> Tensor:
    return torch.empty(out, inner, dtype=torch.bfloat16, device=DEVICE).normal_(0.0, inner**-0.5)


def layer_weights(shape: Shape) -> Weights:
    heads = shape.heads * shape.head_size
    return Weights(
        qkv=weight(heads + 2 * shape.kv_heads * shape.head_size, shape.width),
        o=weight(shape.width, heads),
        gate_up=weight(2 * shape.ffn, shape.width),
        down=weight(shape.width, shape.ffn),
        norm=torch.ones(shape.width, device=DEVICE),
    )


class Step:
    """One decode step of `rows` rows that see `context` keys each."""

    def __init__(self, shape: Shape, weights: list[Weights], rows: int, context: int) -> None:
        self.shape, self.weights, self.rows = shape, weights, rows
        self.work = paged([context] * rows, shape.heads, shape.kv_heads, shape.head_size, shape.layers, torch.bfloat16)
        self.workspace = make_workspace(rows, shape.heads, shape.head_size, DEVICE)
        tables = (self.work[name] for name in ("cache", "page_table", "slots", "lengths"))
        self.items = make_items(*tables, self.workspace.num_sms)
        self.turn = torch.rand(2, rows, shape.head_size // 2, device=DEVICE).unbind()
        self.x = torch.randn(rows, shape.width, device=DEVICE, dtype=torch.bfloat16)
        self.mixed = torch.randn(rows, weights[0].o.shape[1], device=DEVICE, dtype=torch.bfloat16)
        self.hidden = torch.randn(rows, shape.ffn, device=DEVICE, dtype=torch.bfloat16)
        self.pair = torch.randn(rows, 2 * shape.ffn, device=DEVICE, dtype=torch.bfloat16)
        self.qkv = torch.randn(rows, len(weights[0].qkv), device=DEVICE, dtype=torch.bfloat16)

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        work = self.work
        return decode_attention(
            qkv, work["cache"], layer, work["page_table"], self.items, *self.turn,
            num_heads=self.shape.heads, scale=self.shape.head_size**-0.5, workspace=self.workspace, dependent=True,
        )  # fmt: skip

    def whole(self) -> None:
        x = self.x.clone()  # products add to it in place
        for at, w in enumerate(self.weights):
            qkv = small_linear.norm_linear(x, w.norm, EPS, 0.0, w.qkv)
            x = small_linear.linear_add(self.attend(qkv, at), w.o, None, x)
            hidden = small_linear.norm_gated(x, w.norm, EPS, 0.0, w.gate_up)
            x = small_linear.linear_add(hidden, w.down, None, x)

    def products(self) -> None:
        x = self.x
        for w in self.weights:
            functional.linear(x, w.qkv)
            x.addmm_(self.mixed, w.o.t(), beta=0.5)
            functional.linear(x, w.gate_up)
            x.addmm_(self.hidden, w.down.t(), beta=0.5)

    def attention(self) -> None:
        for at in range(len(self.weights)):
            self.attend(self.qkv, at)

    def elementwise(self) -> None:
        for w in self.weights:
            fused.rms_norm(self.x, w.norm, EPS, 0.0)
            fused.rms_norm(self.x, w.norm, EPS, 0.0)
            fused.gated(self.pair, "silu")


def milliseconds(body: Callable[[], None]) -> float:
    return replay_us([body], repeats=9) / 1e3


def step_line(shape: Shape, weights: list[Weights], rows: int, context: int) -> Step:
    step = Step(shape, weights, rows, context)
    whole = milliseconds(step.whole)
    parts = {body.__name__: milliseconds(body) for body in (step.products, step.attention, step.elementwise)}
    told = " · ".join(f"{name} {took:.3f}" for name, took in parts.items())
    print(f"{rows} x {context}: {whole:.3f} ms = {told} · rest {whole - sum(parts.values()):.3f}", flush=True)
    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--context", type=int, default=256)
    args = parser.parse_args()
    shape = Shape()
    weights = [layer_weights(shape) for _ in range(shape.layers)]
    for rows in args.rows:
        step_line(shape, weights, rows, args.context)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
