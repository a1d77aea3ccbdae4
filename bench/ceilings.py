"""Limits of a GPU, measured in the run that is compared with them: copy bandwidth, rate of large products."""

from __future__ import annotations

import time

import numpy as np

SETTLE_S = 2.0  # of large products, until the card is at its power cap


def gpu_seconds(run, repeats: int = 10, settle_s: float = 0.0) -> float:  # type: ignore[no-untyped-def]
    """Median time of a call on the GPU, after two calls to warm up and `settle_s` seconds of them."""
    import torch

    times = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < settle_s:
        run()
        torch.cuda.synchronize()
    for turn in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return float(np.median(times))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / gpu_seconds(lambda: target.copy_(source))


def linear_rate(tokens: int, shapes: list[tuple[int, int]], layers: int = 32) -> float:
    """bf16 operations a second of a model's products, one after another, sustained: what a long prefill has.

    shapes: (out, in) of a layer's weights.
    """
    import torch

    weights = [torch.randn(out, inner, device="cuda", dtype=torch.bfloat16) * inner**-0.5 for out, inner in shapes]
    inputs = [torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16) for _, inner in shapes]

    def run() -> None:
        for _ in range(layers):
            for x, weight in zip(inputs, weights, strict=True):
                torch.nn.functional.linear(x, weight)

    operations = 2 * tokens * layers * sum(out * inner for out, inner in shapes)
    return operations / gpu_seconds(run, 5, SETTLE_S)
