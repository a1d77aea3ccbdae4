"""Kernels of the PyTorch backend on one GPU, each beside the limits of the same run.

    python -m bench.kernels [linear|passes|sampling|attention|persistent|quant] [options of the part]
    python -m bench.kernels --tpu v6e [--write]     blocks of the TPU products by static cycles, with no TPU

Prints the copy bandwidth and the rate of a large bf16 product, then calls the part (bench/kernels_<part>.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from bench import tpu_tune
from bench.ceilings import copy_bandwidth, linear_rate


def parts() -> dict[str, Callable[[list[str], float], object]]:
    from bench import (
        kernels_attention,
        kernels_linear,
        kernels_passes,
        kernels_persistent,
        kernels_quant,
        kernels_sampling,
    )

    return {
        "linear": kernels_linear.main,
        "passes": kernels_passes.main,
        "quant": kernels_quant.main,
        "sampling": kernels_sampling.main,
        "attention": lambda options, bandwidth: kernels_attention.main(options),  # measures the bandwidth by itself
        "persistent": lambda options, bandwidth: kernels_persistent.main(options),
    }


def main() -> int:
    if sys.argv[1:2] == ["--tpu"]:
        return tpu_tune.main(sys.argv[2:])
    every, given = parts(), sys.argv[1:]
    wanted, options = ([given[0]], given[1:]) if given and given[0] in every else (list(every), given)
    bandwidth, rate = copy_bandwidth(), linear_rate(8192, [(8192, 8192)], layers=4)
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 8192^3 product {rate / 1e12:.0f} TFLOP/s", flush=True)
    for part in wanted:
        every[part](options, bandwidth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
