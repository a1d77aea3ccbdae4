"""Block sizes of the TPU matrix products: data/matmul.json, by generation, variant and class of shapes.

An entry says where it is from: "static" (cycles of the compiler's schedule, bench/tpu_tune.py) or "measured" (on the
chip). Nothing in the engine calls this yet.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pallas_kernels.tpu_matmul import LANES, Block

TABLE = Path(__file__).parent / "data" / "matmul.json"
ROW_TILE = 32  # rows of a register of int8 and fp8; half of it would do for bf16


def block_for(generation: str, variant: str, rows: int, inner: int, columns: int) -> Block:
    """The block of the class with the fewest rows that holds `rows`, else of the largest, cut down to the shape; of two
    classes of so many rows that with the most columns that are there.

    K of the block becomes the largest multiple of 128 that divides K; rows and columns no more than there are. Raises
    ValueError for a generation or variant that the table has not, and for a K that is no multiple of 128.
    """
    variants = table().get(generation, {})
    if variant not in variants:
        known = {name: sorted(held) for name, held in table().items()}
        raise ValueError(f"{variant} on {generation}: no blocks; there are {known}")
    if inner % LANES:
        raise ValueError(f"K {inner}: a multiple of {LANES} is wanted")
    classes: dict[int, dict[int, Any]] = {}
    for name, held in variants[variant].items():
        of_class = name.split("x")
        classes.setdefault(int(of_class[0]), {})[int(of_class[2])] = held
    widths = classes[min((held for held in classes if held >= rows), default=max(classes))]
    entry = widths[max((width for width in widths if width <= columns), default=min(widths))]
    m, k, n, chunk = entry["block"]
    whole = inner // LANES
    k = LANES * max(part for part in range(1, k // LANES + 1) if whole % part == 0)
    n = min(n, -(-columns // LANES) * LANES)
    m, chunk = min(m, -(-rows // ROW_TILE) * ROW_TILE), chunk if n % chunk == 0 else LANES
    return Block(m=m, k=k, n=n, chunk=chunk, scaling=entry.get("scaling", "sums"))


@cache
def table() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
    return found
