"""`twinfer collect-env`: what a bug report needs. A fixed list of facts; of secrets only whether they are set."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from pathlib import Path

from engine import env
from engine.entrypoints.version import version

PACKAGES = [
    "jax",
    "jaxlib",
    "flax",
    "libtpu",
    "torch",
    "triton",
    "torch-xla",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "msgspec",
    "pyzmq",
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "orjson",
    "prometheus-client",
    "orbax-checkpoint",
]
# Variables of others that change how frameworks run; ours are in engine/env.py.
VARIABLES = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "LD_PRELOAD")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def first_match(path: str, key: str) -> str | None:
    """The value of the first line `key: value` of a /proc file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key) and ":" in line), None)


def gpus() -> str | None:
    """What nvidia-smi says, None without one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(done.stdout.split("\n")).strip("; ") or None


def tpus() -> str | None:
    chips = sorted(p.name for p in Path("/dev").glob("accel*"))
    return ", ".join(chips) or None


def memory() -> str | None:
    total = first_match("/proc/meminfo", "MemTotal")
    return None if total is None else f"{int(total.split()[0]) / 2**20:.1f} GiB"


def package(name: str) -> str | None:
    try:
        return distribution_version(name)
    except PackageNotFoundError:
        return None


def report() -> dict[str, str]:
    """Fact -> value; facts that this machine does not have are left out."""
    facts: dict[str, Callable[[], str | None]] = {
        "twinfer": version,
        "python": platform.python_version,
        "system": platform.platform,
        "libc": lambda: " ".join(platform.libc_ver()),
        "cpu": lambda: first_match("/proc/cpuinfo", "model name"),
        "cores": lambda: str(len(os.sched_getaffinity(0))),
        "memory": memory,
        "nvidia gpus": gpus,
        "tpus": tpus,
    }
    found = {name: fact() for name, fact in facts.items()}
    found |= {name: package(name) for name in PACKAGES}
    found |= {f"${name}": os.environ.get(name) for name in VARIABLES}
    for variable in env.VARIABLES:
        value = env.read(variable.name)
        found[f"${variable.name}"] = "(set)" if variable.secret and value else value
    return {name: value for name, value in found.items() if value}


def run(args: argparse.Namespace) -> int:
    found = report()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    width = max(map(len, found)) + 2
    for name, value in found.items():
        print(f"{name:<{width}}{value}")
    return 0
