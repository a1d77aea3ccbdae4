"""Seconds until weights lie on the devices: safetensors beside an Orbax checkpoint of `twinfer convert`.

    python -m bench.restore [--devices 1 8] [--rounds 3]

Qwen3-0.6B's shapes with random weights, 1.2 GB in bfloat16, on virtual devices of a CPU. Each load is a process of its
own, sides in turns, the best of the rounds: seconds of `load_weights` until every array is ready, and of it what
importing Orbax takes. "cached" has the files in the page cache, "from disk" has them dropped before
(POSIX_FADV_DONTNEED).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import save_file

from bench.shapes import QWEN3_06B
from engine.entrypoints import convert_command
from engine.specs.checkpoint import read_config
from engine.specs.families import parse_config
from engine.specs.weights import dummy_params

ROOT = Path(__file__).resolve().parent.parent


def write_safetensors(folder: Path) -> int:
    """-> bytes of the weights."""
    import ml_dtypes

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_06B))
    tensors = {
        param.sources[0].name: tensor.data.view(ml_dtypes.bfloat16)
        for param, tensor in dummy_params(parse_config(read_config(folder)), seed=0)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def drop(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as open_file:
                os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: Path, devices: int) -> tuple[float, float]:
    """(seconds until all is there, of it Orbax's import), in this process."""
    import jax

    from backends.jax.load import load_weights
    from backends.jax.split import Split
    from engine.runner import RunnerConfig
    from engine.specs.manifest import is_orbax

    config = RunnerConfig(
        arch=parse_config(read_config(folder)), dtype="bfloat16", kv_dtype="bfloat16", max_slots=1, max_model_len=64,
        page_tokens=(64,), token_buckets=(16,), row_buckets=(1,),
    )  # fmt: skip
    split = Split(jax.devices()[:devices])
    begun = time.monotonic()
    if is_orbax(folder):
        import backends.jax.restore  # noqa: F401
    imported = time.monotonic() - begun
    jax.block_until_ready(load_weights(config, folder, split, None))
    return time.monotonic() - begun, imported


def child(folder: Path, devices: int) -> tuple[float, float]:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "bench.restore", "--load", str(folder), "--devices", str(devices)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, check=True)
    seconds, imported = json.loads(done.stdout.splitlines()[-1])
    return seconds, imported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load is not None:
        print(json.dumps(load(args.load, args.devices[0])))
        return
    with tempfile.TemporaryDirectory() as name:
        sides = {"safetensors": Path(name) / "safetensors", "orbax": Path(name) / "orbax"}
        num_bytes = write_safetensors(sides["safetensors"])
        begun = time.monotonic()
        convert_command.run(sides["safetensors"], sides["orbax"])
        print(f"{num_bytes / 1e9:.2f} GB, converted in {time.monotonic() - begun:.1f} s, load {os.getloadavg()[0]:.1f}")
        for cache in ("cached", "from disk"):
            for devices in args.devices:
                found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
                for _ in range(args.rounds):
                    for side, folder in sides.items():
                        if cache == "from disk":
                            drop(folder)
                        found[side].append(child(folder, devices))
                best = {side: min(times) for side, times in found.items()}
                told = ", ".join(f"{side} {seconds:.2f} s" for side, (seconds, _) in best.items())
                ratio = best["orbax"][0] / best["safetensors"][0]
                imported = best["orbax"][1]
                print(f"{cache:9}  {devices} devices  {told} (import {imported:.2f} s), ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
