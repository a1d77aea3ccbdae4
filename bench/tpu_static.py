"""What the TPU compiler makes of the Pallas kernels, with no TPU: bundles, spills, tensor-core and vector slots.

python -m bench.tpu_static [--write]      prints the table, or writes pallas_kernels/data/static.json

Each generation is compiled in a process of its own, since dumps are asked for by an environment variable. A bundle is
one issue of the VLIW core, so bundles of the loop bound a block's cycles from above, branches not taken included; waits
for memory are not in them. Figures are static, nothing runs. Needs libtpu (pip install 'twinfer[tpu]').
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.tpu_chip import DATA, GENERATIONS, compiler, run_child

TABLE = DATA / "static.json"
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
    "decode_fp8": {"form": "fp8"},
    "decode_int8": {"form": "int8"},
    "prefill": {},
    "prefill_window": {"window": 1000},
    "prefill_capped": {"logit_cap": 50.0},
    "prefill_head64": {"size": 64},
    "prefill_one_head": {"kv_heads": 1, "group": 8},
    "prefill_fp8": {"form": "fp8"},
    "prefill_int8": {"form": "int8"},
}
"""Variants of attention: 8 KV heads of 128, groups of 4, 64 rows, unless they say otherwise."""
OTHERS = ("copy_pages", "gather_pages", "scatter_pages", "keep", "matmul", "matmul_w8a8", "matmul_w4a16")
"""Kernels beside attention, at the shapes of tpu_shapes.py; none is in the step yet."""


def compile_all(generation: str) -> None:
    """In the child: every kernel for one chip. The compiler writes its dumps where the environment says."""
    from bench.tpu_shapes import jobs

    compile_for = compiler(generation)
    for _, function, shapes, donated in jobs(SHAPES):
        compile_for(function, shapes, donated)


def measure(generation: str) -> dict[str, dict[str, int]]:
    """Of each kernel: bundles, those in loops, bytes of VMEM, slots that instructions take. Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        run_child("bench.tpu_static", ["--child", generation], flags)
        return {name: read(Path(folder), name) for name in (*SHAPES, *OTHERS)}


def read(folder: Path, name: str) -> dict[str, int]:
    """A kernel's figures from the compiler's last dumps."""
    bundles = only(folder, rf"-{name}\.1-\d+-final_bundles\.txt").read_text().splitlines()
    lines = [line for line in bundles if re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w)?:", line)]
    table = only(folder, rf"-{name}\.1-\d+-final_hlo-static-per-bundle-utilization\.txt").read_text()
    rows = [line.split() for line in table.split("UTILIZATION:")[1].splitlines()]
    sums = [sum(int(row[slot]) for row in rows if len(row) == len(SLOTS)) for slot in range(len(SLOTS))]
    in_loops = sum(bool(re.match(r"\s*\w+\s+(\w\w)?:\s*>", line)) for line in lines)
    allocated = only(folder, rf"-{name}\.1-\d+-post-grt\.txt").read_text()
    vmem = sum(int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", allocated))
    return {"bundles": len(lines), "loop": in_loops, "vmem": vmem, **dict(zip(SLOTS, sums, strict=True))}


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
