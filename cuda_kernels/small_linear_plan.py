"""Which kernel with which block sizes takes a product of few rows: the table data/small_linear.json, read once.

An entry belongs to a shape class: plain or gated, and the weight's (O, I). A product takes the entries of its kind
whose shape is nearest, and of those the smallest `rows` that holds it. `source` says where an entry comes from:
measured (device and date) or a guess. Used by small_linear.py and by the bench that writes the table.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "data" / "small_linear.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to run a product. kernel: vector (one row), tile, slab, or library (cuBLAS, norm and gate apart)."""

    kernel: str
    block_out: int = 64
    block_in: int = 64  # tile: of the inner axis
    splits: int = 1  # tile: programs that share a block of outputs
    warps: int = 4
    stages: int = 4
    programs: int = 2  # vector: programs of a multiprocessor
    request: int = 0  # blocks of weights asked for before the kernel before has ended
    norm_apart: bool = False  # tile: the norm is a kernel of its own


LIBRARY = Plan(kernel="library")
SLAB = Plan(kernel="slab")


@functools.cache
def _entries() -> tuple[tuple[bool, int, int, int, Plan], ...]:
    """(gated, O, I, most rows, plan)."""
    table: list[dict[str, Any]] = json.loads(TABLE.read_text())["entries"]
    return tuple((e["gated"], *e["shape"], e["rows"], Plan(**e["plan"])) for e in table)


@functools.lru_cache(4096)
def plan_of(rows: int, num_out: int, inner: int, gated: bool) -> Plan:
    """The table's answer; `library` for more rows than the nearest shape's entries hold. num_out: O of the weight."""

    def distance(entry: tuple[bool, int, int, int, Plan]) -> float:
        return abs(math.log(entry[1] / num_out)) + abs(math.log(entry[2] / inner))

    same = [entry for entry in _entries() if entry[0] == gated]
    nearest = min(map(distance, same))
    fit = [entry for entry in same if distance(entry) == nearest and entry[3] >= rows]
    return min(fit, key=lambda entry: entry[3])[4] if fit else LIBRARY
