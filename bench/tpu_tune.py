"""Block sizes of the TPU matrix products by static cycles, with no TPU: writes pallas_kernels/data/matmul.json.

    python -m bench.kernels --tpu v6e [--variants fp8 ...] [--write]     of one generation; prints, or fills the table

Every candidate of a variant and a class of shapes is compiled under a name of its own, and the compiler's static
profile says its cycles, waits for blocks at the bandwidth that the compiler assumes included (few rows come out near
memory_cycles, the weight, inputs and outputs once over CHIPS' bandwidth). share_of_ideal is of the products over what
the matrix units take a cycle, CHIPS again. Assumed of a device as the compiler counts them: v5e 4 units of 128 x 128 at
1.5 GHz (197 TFLOP/s); v6e 2 units of 256 x 256 that take two rows a cycle, 1.75 GHz (918 TFLOP/s); v5p two cores of 4
units of 128 x 128 between which a parallel grid is split, 1.75 GHz (459 TFLOP/s); tpu7x one of two cores, as v6e,
2.2 GHz (2307 TFLOP/s for both). int8 at twice that where a chip has it, fp8 on tpu7x. Nothing here ran on one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.tpu_chip import DATA, GENERATIONS, compiler, run_child

TABLE = DATA / "matmul.json"
# bf16 products a cycle; how much faster int8 and fp8 are; bytes of HBM a cycle
CHIPS: dict[str, tuple[int, dict[str, int], float]] = {
    "v5e": (4 * 128 * 128, {"int8": 2}, 819 / 1.5),
    "v6e": (4 * 256 * 256, {"int8": 2}, 1640 / 1.75),
    "v5p": (8 * 128 * 128, {"int8": 2}, 2765 / 1.75),
    "tpu7x": (4 * 256 * 256, {"fp8": 2}, 7370 / 2 / 2.2),
}
INNER, COLUMNS, MANY_COLUMNS = 4096, 4096, 14336
VARIANTS = ("bf16", "int8", "fp8", "w4")
WIDE = [(4096, 256, 256), (4096, 512, 256), (4096, 512, 512), (2048, 1024, 512)]  # inner, columns, chunk
LARGE = [
    (512, 4096, 512, 256), (1024, 4096, 512, 256), (1024, 4096, 512, 512), (2048, 4096, 256, 256),
    (2048, 4096, 512, 512), (2048, 4096, 512, 256), (1024, 4096, 1024, 1024), (1024, 2048, 1024, 1024),
]  # fmt: skip
CANDIDATES: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {
    (16, COLUMNS): [(16, *sizes) for sizes in (*WIDE, (4096, 1024, 1024), (2048, 2048, 1024))],
    (128, COLUMNS): [(128, *sizes) for sizes in WIDE],
    (512, COLUMNS): [(512, *sizes) for sizes in (*WIDE, (4096, 1024, 1024), (2048, 1024, 1024))],
    (2048, COLUMNS): LARGE,
    (2048, MANY_COLUMNS): LARGE,
}
"""By rows and columns of the product: (rows, inner, columns, chunk) of a block."""
BF16_VECTORS = ("v6e", "tpu7x")  # elsewhere scales on 4-bit weights are not tried: the profiler fails on v5e and v5p
MAX_W4_CHUNK = 256  # unpacking is straight code: twice the chunk takes many times as long to compile


def candidates(generation: str, variant: str) -> list[str]:
    """Names: rows and columns of the class, sizes of the block, and where 4-bit scales go."""
    found = []
    for (rows, columns), blocks in CANDIDATES.items():
        for block in blocks:
            name = f"{rows}_{columns}_{'_'.join(map(str, block))}"
            if variant != "w4":
                found.append(name)
            elif block[3] <= MAX_W4_CHUNK:
                found += [f"{name}_{scaling}" for scaling in ("sums", "weights")[: 1 + (generation in BF16_VECTORS)]]
    return found


def job(generation: str, variant: str, name: str) -> tuple[Any, list[Any]]:
    """A function and the shapes of its arguments, of one candidate."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.tpu_matmul import LANES, Block, product

    rows, columns, m, k, n, chunk = map(int, name.split("_")[:6])
    scaling: Any = name.split("_")[6] if variant == "w4" else "sums"
    block = Block(m=m, k=k, n=n, chunk=chunk, scaling=scaling)
    groups, f32, bf16, e4m3 = INNER // LANES, jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn
    x, w = {"int8": (jnp.int8, jnp.int8), "fp8": (e4m3 if generation == "tpu7x" else bf16, e4m3)}.get(
        variant, (bf16, jnp.int32 if variant == "w4" else bf16)
    )
    of_weights, of_sums = ((columns, groups), bf16), ((groups, columns), f32)
    kind, scales = {
        "bf16": ("plain", []),
        "w4": (scaling, [of_weights if scaling == "weights" else of_sums]),
    }.get(variant, ("scaled", [((rows, 1), f32), ((1, columns), f32)]))
    weight = (columns // 8 if variant == "w4" else columns, INNER)
    shapes = [jax.ShapeDtypeStruct(*each) for each in (((rows, INNER), x), (weight, w), *scales)]
    return lambda x, w, *s: product(x, w, s, kind, block, jnp.dtype(bf16), False, "m" + name), shapes


def cycles_of(generation: str, variant: str) -> dict[str, int]:
    """Static cycles by candidate. The profiler of tpu7x ends its process after a kernel: the rest gets another one."""
    left = candidates(generation, variant)
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        while left:
            given = ["--child", generation, variant, *left]
            try:
                run_child("bench.tpu_tune", given, f"--xla_jf_dump_static_llo_profile_to={folder}")
                tried = len(left)
            except RuntimeError as error:
                tried = 1 + max((n for n, name in enumerate(left) if profile(folder, name).exists()), default=-1)
                if not tried:
                    raise RuntimeError(f"{generation} {variant} {left[0]} does not compile") from error
            for name in left[:tried]:
                if profile(folder, name).exists():
                    text = re.search(rf'"m{name}\.1"\s+estimated_cycles: (\d+)', profile(folder, name).read_text())
                    found[name] = int(text[1]) if text else 0
            left = left[tried:]
    return {name: cycles for name, cycles in found.items() if cycles}


def profile(folder: str, name: str) -> Path:
    return Path(folder) / f"m{name}.1_static_llo_profile.textproto"


def child(generation: str, variant: str, names: list[str]) -> None:
    compile_for = compiler(generation)
    for name in names:
        compile_for(*job(generation, variant, name))


def tune(generation: str, variants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each variant and class of shapes the block with the fewest cycles."""
    units, faster, bandwidth = CHIPS[generation]
    table: dict[str, dict[str, Any]] = {}
    for variant in variants:
        cycles = cycles_of(generation, variant)
        a_weight = {"bf16": 2, "int8": 1, "fp8": 1, "w4": 0.5}[variant]
        table[variant] = {}
        for rows, columns in CANDIDATES:
            shape = f"{rows}x{INNER}x{columns}"
            best, name = min((count, name) for name, count in cycles.items() if name.startswith(f"{rows}_{columns}_"))
            ideal = rows * INNER * columns / (units * faster.get(variant, 1))
            table[variant][shape] = {
                "block": [int(size) for size in name.split("_")[2:6]],
                **({"scaling": name.split("_")[6]} if variant == "w4" else {}),
                "source": "static",
                "cycles": best,
                "share_of_ideal": round(ideal / best, 3),
                "memory_cycles": round((a_weight * INNER * columns + 2 * rows * (INNER + columns)) / bandwidth),
            }
            print(generation, variant, rows, table[variant][shape], flush=True)
    return table


def main(options: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generation", choices=list(GENERATIONS))
    parser.add_argument("--write", action="store_true", help="put the blocks into pallas_kernels/data/matmul.json")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="some of them")
    args = parser.parse_args(options)
    found = tune(args.generation, args.variants)
    if args.write:
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        table.setdefault(args.generation, {}).update(found)
        TABLE.write_text(json.dumps({name: table[name] for name in GENERATIONS if name in table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4:])
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))
