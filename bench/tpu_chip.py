"""Compiling for a TPU with no TPU, for tpu_tune.py.

The compiler's dumps are asked for by an environment variable, and one process compiles for one generation: so a parent
starts `python -m <module> --child <generation>` for each, which compiles and leaves the dumps in a folder. Needs libtpu
(pip install 'twinfer[tpu]'). Figures that come of it are static: nothing runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "pallas_kernels" / "data"
GENERATIONS = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}


def run_child(module: str, arguments: Sequence[str], flags: str) -> str:
    """Its standard output. Raises RuntimeError where it fails, or libtpu is missing."""
    found = find_spec("libtpu")
    if found is None or found.origin is None:
        raise RuntimeError("libtpu is not installed; pip install 'twinfer[tpu]'")
    told = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two generations side by side: nobody holds a chip
        "TPU_LIBRARY_PATH": str(Path(found.origin).parent / "libtpu.so"), "LIBTPU_INIT_ARGS": flags,
    }  # fmt: skip
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env={**os.environ, **told}, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout


def compiler(generation: str) -> Callable[..., None]:
    """In the child: compile(function, shapes, donated=()) for one chip of the generation."""
    import jax
    from jax.experimental import topologies

    topology = GENERATIONS[generation]
    one = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one).devices
    mesh = jax.sharding.Mesh(devices[:1], ("x",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def compile_for(function: Callable[..., Any], shapes: Sequence[Any], donated: tuple[int, ...] = ()) -> None:
        with jax.sharding.set_mesh(mesh):
            jax.jit(function, in_shardings=here, out_shardings=here, donate_argnums=donated).lower(*shapes).compile()

    return compile_for
