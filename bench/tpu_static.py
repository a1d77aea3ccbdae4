"""What the TPU compiler makes of the Pallas kernels, with no TPU: bundles, spills, tensor-core and vector slots.

python -m bench.tpu_static [--write]      prints the table, or writes pallas_kernels/data/static.json

Each generation is compiled in a process of its own, since dumps are asked for by an environment variable. A bundle is
one issue of the VLIW core, so bundles of the loop bound a block's cycles from above, branches not taken included; waits
for memory are not in them. Figures are static, nothing runs. Needs libtpu (pip install 'twinfer[tpu]').
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parent.parent / "pallas_kernels" / "data" / "static.json"
GENERATIONS = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}
SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "fills", "VSTORE", "spills", "SALU")
SHAPES: dict[str, dict[str, Any]] = {
    "decode": {},
    "decode_window": {"window": 1000},
    "decode_capped": {"logit_cap": 50.0},
    "decode_sinks": {"sinks": True},
    "decode_group8": {"group": 8},
    "decode_head64": {"size": 64},
    "decode_head80": {"size": 80},
    "decode_head96": {"size": 96},
    "decode_head256": {"kv_heads": 4, "size": 256},
}
"""Variants of decode_attention: 8 KV heads of 128, groups of 4, 64 rows, unless they say otherwise."""


def compile_all(topology: str) -> None:
    """In the child: every variant for one chip. The compiler writes its dumps where the environment says."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from pallas_kernels.tpu_decode import Blocks, decode_attention

    one = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one).devices
    mesh = jax.sharding.Mesh(devices[:1], ("x",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def halves(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    for name, given in SHAPES.items():
        options = {"kv_heads": 8, "group": 4, "size": 128, "sinks": False, **given}
        kv_heads, heads, size = options["kv_heads"], options["kv_heads"] * options["group"], options["size"]
        limits = {key: options[key] for key in ("window", "logit_cap") if key in options}
        rows, blocks = 64, ints(1024)
        listed = Blocks(count=ints(1), rows=blocks, pages=blocks, starts=blocks)
        new = halves(rows, kv_heads * size)
        cache = halves(2, 1024, 2, 128, kv_heads * size)
        shapes = [halves(rows, heads, size), new, new, cache, ints(1), listed, ints(rows)]
        if options["sinks"]:
            shapes.append(jax.ShapeDtypeStruct((heads,), jnp.float32))

        def run(*args: Any, name: str = name, limits: dict[str, Any] = limits) -> Any:
            sinks = args[7] if len(args) > 7 else None
            return decode_attention(*args[:7], scale=0.088, sinks=sinks, name=name, **limits)

        with jax.sharding.set_mesh(mesh):
            jax.jit(run, in_shardings=here, out_shardings=here, donate_argnums=(3,)).lower(*shapes).compile()


def measure(generation: str) -> dict[str, dict[str, int]]:
    """Of each variant: bundles, those inside loops, and slots that instructions take. Raises RuntimeError."""
    found = find_spec("libtpu")
    if found is None or found.origin is None:
        raise RuntimeError("libtpu is not installed; pip install 'twinfer[tpu]'")
    with tempfile.TemporaryDirectory() as folder:
        told = {
            "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TPU_LIBRARY_PATH": str(Path(found.origin).parent / "libtpu.so"),
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }  # fmt: skip
        command = [sys.executable, "-m", "bench.tpu_static", "--child", GENERATIONS[generation]]
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(
            command, env={**os.environ, **told}, cwd=root, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{generation}: {done.stderr[-2000:]}")
        return {name: read(Path(folder), name) for name in SHAPES}


def read(folder: Path, name: str) -> dict[str, int]:
    """A kernel's figures from the compiler's last dumps."""
    bundles = only(folder, rf"-{name}\.1-\d+-final_bundles\.txt").read_text().splitlines()
    lines = [line for line in bundles if re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w)?:", line)]
    table = only(folder, rf"-{name}\.1-\d+-final_hlo-static-per-bundle-utilization\.txt").read_text()
    rows = [line.split() for line in table.split("UTILIZATION:")[1].splitlines()]
    sums = [sum(int(row[slot]) for row in rows if len(row) == len(SLOTS)) for slot in range(len(SLOTS))]
    in_loops = sum(bool(re.match(r"\s*\w+\s+(\w\w)?:\s*>", line)) for line in lines)
    return {"bundles": len(lines), "loop": in_loops, **dict(zip(SLOTS, sums, strict=True))}


def only(folder: Path, pattern: str) -> Path:
    found = [path for path in folder.iterdir() if re.search(pattern, path.name)]
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} files like {pattern} in the compiler's dumps")
    return found[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table that tests hold the kernels to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        compile_all(args.child)
        return 0
    table = {generation: measure(generation) for generation in GENERATIONS}
    for generation, kernels in table.items():
        for name, figures in kernels.items():
            print(f"{generation:6} {name:16}", *(f"{key} {value}" for key, value in figures.items()))
    if args.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps({"source": "static", "table": table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
