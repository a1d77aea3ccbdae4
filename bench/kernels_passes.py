"""Bench lines of the passes between products on a GPU, and of the gated product of many rows, beside their bytes.

Norm, gate, sums that are normed, and gate and up with the activation inside: microseconds a launch in one graph, over
inputs that no launch shares with the next, beside the copy bandwidth of the same run. `python -m bench.kernels passes`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernels_attention import DEVICE, replay_us
from cuda_kernels import fused, split_sum, wide_gated
from cuda_kernels.split_sum import Sum

WIDTH, FFN, EPS = 4096, 14336, 1e-6
ROWS = (1, 64, 128, 256, 8192)


def line(name: str, launches: list[Callable[[], object]], moved: int, peak: float) -> None:
    """moved: bytes that a launch reads and writes."""
    took = replay_us(launches)
    rate = moved / took * 1e6
    print(f"{name:32} {took:8.1f} us  {rate / 1e9:6.0f} GB/s {100 * rate / peak:4.0f} %", flush=True)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def main(options: list[str], peak: float) -> None:
    """8B shapes, bfloat16. peak: bytes a second of a copy."""
    if options:
        raise SystemExit(f"passes: no options are known, not {options}")
    gain = torch.ones(WIDTH, device=DEVICE)
    for rows in ROWS:
        count = 2 if rows > 1024 else 8
        xs, pairs = random(count, rows, WIDTH), random(count, rows, 2 * FFN)
        line(f"norm {rows}", [lambda x=x: fused.rms_norm(x, gain, EPS, 0.0) for x in xs], 4 * xs[0].numel(), peak)
        line(f"gate {rows}", [lambda x=x: fused.gated(x, "silu") for x in pairs], 3 * pairs[0].numel(), peak)
        if rows <= split_sum.MOST_ROWS:
            sums = [Sum(random(split_sum.PIECES, rows, WIDTH, dtype=torch.float32), x, None) for x in xs]
            moved = 4 * sums[0].pieces.numel() + 6 * xs[0].numel()
            line(f"sum of pieces, normed {rows}", [lambda x=x: x.normed(gain, EPS, 0.0) for x in sums], moved, peak)
    weights = random(4, 2 * FFN, WIDTH)
    x, moved = random(wide_gated.ROWS, WIDTH), 2 * weights[0].numel()
    one = [lambda w=w: wide_gated.multiply(x, w, None, "silu") for w in weights]
    two = [lambda w=w: fused.gated(torch.nn.functional.linear(x, w), "silu") for w in weights]
    line(f"gate_up {len(x)}", one, moved, peak)
    line(f"gate_up {len(x)}, cuBLAS and gate", two, moved, peak)
