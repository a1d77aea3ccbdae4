"""Products with weights in few bits on a GPU, beside the same product of bfloat16.

    python -m bench.kernels quant [--models 8b 0.6b 4b] [--rows 1 16 64 1024] [--forms fp8 block int8 w4]

A figure is the time of one product with what makes its inputs ready (norm, rounding), within a captured graph whose
launches read different weights, several times the L2 cache together; behind it the bytes of the weight over that time,
as a share of the copy bandwidth of the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.kernels_linear import MODELS, Product
from cuda_kernels import quant_linear, small_linear
from cuda_kernels.quant_layout import plain_weight, round_to_fp8
from cuda_kernels.quant_weight import BLOCK, QuantWeight

CACHES = 150e6  # bytes of weights that a graph reads at least
GROUP = 128
FORMS = ("fp8", "block", "int8", "w4")


def make_weight(form: str, product: Product) -> QuantWeight:
    rows, inner = product.num_out, product.inner
    if form == "w4":
        packed = torch.randint(-(1 << 31), 1 << 31, (rows, inner // 8), device="cuda").to(torch.int32)
        scale = torch.full((rows, inner // GROUP), 0.01, dtype=torch.bfloat16, device="cuda")
        zeros = torch.full(scale.shape, 8, dtype=torch.int8, device="cuda")
        return QuantWeight(scheme="w4", act="none", data=packed, scale=scale, zeros=zeros, group=GROUP)
    weight = round_to_fp8(torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16))
    if form == "fp8":
        return weight
    if form == "int8":
        data = torch.randint(-127, 128, (rows, inner), dtype=torch.int8, device="cuda")
        return plain_weight("int8", "token", {"data": data, "scale": weight.scale}, False)
    scale = torch.rand(-(-rows // BLOCK), -(-inner // BLOCK), device="cuda")
    return plain_weight("fp8", "block", {"data": weight.data, "scale": scale}, True)


def captured_us(calls: list[Callable[[], Tensor]]) -> float:
    """Microseconds of one call of a graph of all, the median of ten replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[5] * 1e3 / len(calls)


def plain_us(product: Product, x: Tensor, gain: Tensor) -> float:
    count = max(2, int(CACHES / product.weight_bytes))
    weights = [torch.randn(product.num_out, product.inner, device="cuda", dtype=x.dtype) for _ in range(count)]
    return captured_us([lambda w=w: small_linear.norm_linear(x, gain, 1e-6, 0.0, w) for w in weights])  # type: ignore[misc]


def kept_us(weight: QuantWeight, x: Tensor, gain: Tensor) -> float:
    count = max(2, int(CACHES / weight.num_bytes))
    weights = [replace(weight, data=weight.data.clone()) for _ in range(count)]
    norm = (gain, 1e-6, 0.0)
    return captured_us([lambda w=w: quant_linear.linear(x, w, norm=norm) for w in weights])  # type: ignore[misc]


def main(options: list[str], bandwidth: float) -> None:
    parser = argparse.ArgumentParser(prog="bench.kernels quant")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["8b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 1024])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    args = parser.parse_args(options)
    for model in args.models:
        for product in MODELS[model][1]:
            weights = {form: make_weight(form, product) for form in args.forms}
            gain = torch.ones(product.inner, device="cuda")
            for rows in args.rows:
                x = torch.randn(rows, product.inner, device="cuda", dtype=torch.bfloat16)
                line = f"{model} {product.name:8} {rows:5} rows: bf16 {plain_us(product, x, gain):7.1f} us"
                for form, weight in weights.items():
                    taken = kept_us(weight, x, gain)
                    share = weight.num_bytes / taken * 1e6 / bandwidth
                    line += f"; {form} {taken:7.1f} us {share:4.0%}"
                print(line, flush=True)
