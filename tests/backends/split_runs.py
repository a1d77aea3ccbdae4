"""Tokens of the jax runner over 1 to 8 devices, as JSON. Run by test_split.py in a process of eight CPU devices.

python -m tests.backends.split_runs unrolled|scanned|tokens|orbax|int8|fp8|int8_pages SIZE...
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from backends.jax import orbax, programs, restore, stacks
from backends.jax.runner import Runner
from backends.jax.split import Split
from backends.jax.weights import load_params
from engine.specs.arch import ArchSpec
from engine.specs.cache import INT8_PAGES
from engine.specs.manifest import write_manifest
from engine.specs.quant import ModelQuant, Pattern, WeightQuant
from engine.specs.weights import dummy_params
from pallas_kernels import dispatch
from tests.backends.driver import Driver, llama

SAMPLINGS = (
    {"num_logprobs": 2},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 50, "num_logprobs": 3, "repetition": 1.2, "bias": {3: 1.0}},
    {"temperature": 1.0, "seed": 6, "allowed": [*range(3, 90), 150, 174, 175, 198]},  # of 8 ranks each has some
)


def arch() -> ArchSpec:
    """8 query heads on 4 KV heads, a window; 199 ids: no multiple of any number of devices."""
    plain = llama(windows=(None, 20, None))
    layers = [replace(layer, mixer=replace(layer.mixer, num_heads=8, num_kv_heads=4)) for layer in plain.layers]
    return replace(plain, layers=tuple(layers))


def quantised(scheme: str) -> ArchSpec:
    """The same with scales of rows, and inputs rounded per token: over all devices that hold a part of them."""
    quant = WeightQuant(scheme=scheme, layout="plain", per="channel", act="token")
    rules = (((Pattern(kind="linear"),), quant),)
    return replace(arch(), quant=ModelQuant(method="compressed-tensors", rules=rules))


def write_checkpoint(folder: Path) -> None:
    """The dummy weights as `twinfer convert` would write them, in a few parts."""
    (folder / "config.json").write_text("{}")
    write_manifest(folder, orbax.write(folder, dummy_params(arch(), 0), part_bytes=20_000))


def compare(folder: Path, size: int) -> None:
    """What Orbax restores is, device by device, what the loader of safetensors puts there."""
    split = Split(jax.devices()[:size])
    for dtype in ("float32", "bfloat16"):
        ours = restore.load(folder, arch(), dtype, split)
        theirs = load_params(arch(), dummy_params(arch(), 0), dtype, split)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert left.dtype == right.dtype and left.sharding.is_equivalent_to(right.sharding, left.ndim)
            for mine, other in zip(left.addressable_shards, right.addressable_shards, strict=True):
                assert mine.device == other.device
                np.testing.assert_array_equal(np.asarray(mine.data), np.asarray(other.data))


def run(
    size: int, checkpoint: Path | None = None, spec: ArchSpec | None = None, pages: str = "float32"
) -> list[object]:
    told = {} if checkpoint is None else {"checkpoint": checkpoint, "load_format": "orbax"}
    told["kv_dtype"] = pages
    d = Driver(Runner(), spec or arch(), tensor_size=size, seed=3, **told)
    found: list[object] = []
    for sampling in SAMPLINGS:
        seqs = [d.new(d.prompt(length), **sampling) for length in (37, 5, 20, 1)]
        d.generate(seqs, 6)
        found += [(seq.outputs, seq.logprobs) for seq in seqs]
        for seq in seqs:
            d.close(seq)
    assert d.runner._state is not None
    for cache in jax.tree.leaves(d.runner._state.caches):  # each device has its heads' part, of scales too
        assert cache.addressable_shards[0].data.nbytes * size == cache.nbytes
    d.runner.shutdown()
    return found


def main() -> None:
    if sys.argv[1] == "scanned":
        dispatch.choose_kernel = lambda platform, head_size: "plain"
        stacks.stacks_layers = lambda platform: True
    if sys.argv[1] == "tokens":
        programs.split_tokens = lambda platform: 8  # every bucket
    sizes = [int(size) for size in sys.argv[2:]]
    if sys.argv[1] != "orbax":
        spec = quantised(sys.argv[1]) if sys.argv[1] in ("int8", "fp8") else None
        pages = INT8_PAGES if sys.argv[1] == "int8_pages" else "float32"
        print(json.dumps({size: run(size, spec=spec, pages=pages) for size in sizes}))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        for size in sizes:
            compare(Path(folder), size)
        print(json.dumps({1: run(1)} | {f"{size} of orbax": run(size, Path(folder)) for size in sizes}))


if __name__ == "__main__":
    main()
