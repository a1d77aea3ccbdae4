"""Kernels of the PyTorch backend on one GPU, each beside the limits of the same run.

    python -m bench.kernels [linear|sampling] [options of the part]

Prints the copy bandwidth and the rate of a large bf16 product, then calls the part (bench/kernels_<part>.py).
"""

from __future__ import annotations

import sys

from bench.ceilings import copy_bandwidth, linear_rate


def main() -> int:
    from bench import kernels_linear, kernels_sampling

    parts = {"linear": kernels_linear.main, "sampling": kernels_sampling.main}
    wanted = [sys.argv[1]] if len(sys.argv) > 1 and sys.argv[1] in parts else list(parts)
    options = sys.argv[2:] if len(sys.argv) > 1 and sys.argv[1] in parts else sys.argv[1:]
    bandwidth, rate = copy_bandwidth(), linear_rate(8192, [(8192, 8192)], layers=4)
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 8192^3 product {rate / 1e12:.0f} TFLOP/s", flush=True)
    return max(parts[part](options, bandwidth) for part in wanted)


if __name__ == "__main__":
    sys.exit(main())
