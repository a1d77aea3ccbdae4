"""What executables built ahead save: seconds to ready three ways, and on a CPU what a call of a loaded program costs.

    python -m bench.executables [--rounds 3] [--device cpu|cuda]

The default model with default flags, jax backend. Each start is a process of its own: with nothing kept, with jax's own
cache of programs warm, and with a bundle; seconds are from the start of the process to ready, medians. Calls are those
of the one-row forward program, compiled and loaded in turns in one process; the time is until the call returns, the
step itself runs behind it and is waited for outside the clock: the tenth percentile, which other work disturbs least.
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
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CALLS = 400
START = """
import json, sys
from twinfer import LLM
llm = LLM(backend="jax", device=sys.argv[1], show_progress=False, executables=sys.argv[2] or None)
print(json.dumps([sum(llm.ready.startup_s.values()), llm.ready.startup_s["warm_up"] + llm.ready.startup_s["allocate"],
                  llm.ready.num_compiles]))
"""


def child(*command: str, cache: str = "") -> str:
    told = {**os.environ, "TWINFER_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=told, capture_output=True, text=True, check=True)
    return done.stdout


def starts(rounds: int, device: str, bundle: str) -> dict[str, list[list[float]]]:
    """Way -> of each round (seconds to ready, seconds of programs, programs compiled)."""
    found: dict[str, list[list[float]]] = {"nothing kept": [], "jax's cache": [], "bundle": []}
    with tempfile.TemporaryDirectory() as kept:
        child("-c", START, device, "", cache=kept)
        for _ in range(rounds):
            found["nothing kept"].append(json.loads(child("-c", START, device, "")))
            found["jax's cache"].append(json.loads(child("-c", START, device, "", cache=kept)))
            found["bundle"].append(json.loads(child("-c", START, device, bundle)))
    return found


def calls(bundle: Path) -> dict[str, float]:
    """Microseconds until a call of the one-row forward program returns: tenth percentile of CALLS each, in turns."""
    import jax
    import numpy as np

    from backends.jax.aot import Bundle
    from backends.jax.batch import packed_size
    from backends.jax.programs import ProgramSet
    from backends.jax.runner import Runner
    from backends.jax.split import Split
    from engine.config import EngineConfig
    from engine.resolve import plan_cache, resolve
    from engine.runner import Placement
    from engine.specs.checkpoint import read_config
    from engine.specs.executables import read_manifest
    from engine.specs.families import parse_config

    folder = ROOT / "engine" / "data" / "default_model"
    config, runner = EngineConfig(backend="jax", device="cpu", executables=str(bundle)), Runner()
    resolved = resolve(config, parse_config(read_config(folder)), runner.describe("cpu"))
    runner.configure(resolved.runner, Placement())
    runner.load(folder)
    pages = read_manifest(bundle).num_pages
    layout, _, _ = plan_cache(config, resolved, runner.cache_budget_bytes(), pages)
    split = Split(jax.devices("cpu")[:1])
    load = Bundle.open(bundle, resolved.runner, split).load
    seconds: dict[str, list[float]] = {"compiled": [], "loaded": []}
    sets = {
        "compiled": ProgramSet(resolved.runner, layout, runner._params, split),
        "loaded": ProgramSet(resolved.runner, layout, runner._params, split, load),
    }
    state: dict[str, Any] = {}
    for name, made in sets.items():
        state[name] = made.fresh_state()
        made.compile(lambda phase, done, total: None)
    packed = np.zeros(packed_size(sets["loaded"].shape(1)), np.int32)
    for call in range(2 * CALLS):
        for name, made in sets.items():
            begun = time.perf_counter()
            flags = made.forward(state[name], 1, packed)[2]
            if call >= CALLS:
                seconds[name].append(time.perf_counter() - begun)
            flags.block_until_ready()
    return {name: sorted(times)[CALLS // 10] * 1e6 for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = args.device
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        print(child("-m", "twinfer", "compile", "-o", str(bundle), "--device", args.device).splitlines()[-1])
        for way, rounds in starts(args.rounds, args.device, str(bundle)).items():
            ready, programs, compiled = (median(column) for column in zip(*rounds, strict=True))
            print(f"{way:12}  ready {ready:6.2f} s, of it programs {programs:6.2f} s, {compiled:.0f} compiled")
        for name, us in (calls(bundle) if args.device == "cpu" else {}).items():
            print(f"call, {name:8}  {us:6.1f} us")


if __name__ == "__main__":
    main()
