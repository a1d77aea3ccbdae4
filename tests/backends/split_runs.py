"""Tokens of the jax runner over 1 to 8 devices, as JSON. Run by test_split.py in a process of eight CPU devices.

python -m tests.backends.split_runs unrolled|scanned SIZE...
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from backends.jax import stacks
from backends.jax.runner import Runner
from engine.specs.arch import ArchSpec
from pallas_kernels import dispatch
from tests.backends.driver import Driver, llama

SAMPLINGS = (
    {"num_logprobs": 2},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 50, "num_logprobs": 3, "repetition": 1.2, "bias": {3: 1.0}},
)


def arch() -> ArchSpec:
    """8 query heads on 4 KV heads, a window; 199 ids: no multiple of any number of devices."""
    plain = llama(windows=(None, 20, None))
    layers = [replace(layer, mixer=replace(layer.mixer, num_heads=8, num_kv_heads=4)) for layer in plain.layers]
    return replace(plain, layers=tuple(layers))


def run(size: int) -> list[object]:
    d = Driver(Runner(), arch(), tensor_size=size, seed=3)
    found: list[object] = []
    for sampling in SAMPLINGS:
        seqs = [d.new(d.prompt(length), **sampling) for length in (37, 5, 20, 1)]
        d.generate(seqs, 6)
        found += [(seq.outputs, seq.logprobs) for seq in seqs]
        for seq in seqs:
            d.close(seq)
    d.runner.shutdown()
    return found


def main() -> None:
    if sys.argv[1] == "scanned":
        dispatch.choose_kernel = lambda platform, head_size: "plain"
        stacks.stacks_layers = lambda platform: True
    print(json.dumps({size: run(int(size)) for size in sys.argv[2:]}))


if __name__ == "__main__":
    main()
