"""Collectives of a compiled program: how often each runs, and how many bytes, read from its optimised HLO.

A collective in a loop counts as often as the loop turns. Bytes are those of the result on one device; an asynchronous
pair counts once, at its start.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(|=).*\{$")
CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)|(?:branch_computations|calls)=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
SHAPE = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")
WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


@dataclass(frozen=True, slots=True)
class Collective:
    kind: str
    shapes: tuple[str, ...]  # of its results, "bf16[256,1024]"
    num_bytes: int
    times: int  # in one run of the program


def collectives(text: str, turns: int) -> list[Collective]:
    """text: Compiled.as_text(). turns: of loops of which it does not say how many; with libtpu that is every loop."""
    lines, entry = split_computations(text)
    times = Counter({entry: 1})
    order = called_order(lines, entry)
    for name in order:
        for line in lines.get(name, ()):
            trips = TRIPS.search(line)
            for callee in callees(line):
                inner = 1 if " while(" not in line else turns if trips is None else int(trips[1])
                times[callee] += times[name] * inner
    found = []
    for name in order:
        for line in lines.get(name, ()):
            operation = OPERATION.search(line)
            if operation is None:
                continue
            shapes = SHAPE.findall(operation[1])
            if operation[3] and len(shapes) > 1:
                shapes = shapes[len(shapes) // 2 :]  # a start has its operands in front of its results
            sizes = [math.prod(map(int, filter(None, sides.split(",")))) * WIDTH[dtype] for dtype, sides in shapes]
            told = tuple(f"{dtype}[{sides}]" for dtype, sides in shapes)
            found.append(Collective(operation[2], told, sum(sizes), times[name]))
    return found


def split_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(lines of each computation, name of the entry)."""
    lines: dict[str, list[str]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head is not None:
            current = head[2]
            lines[current] = []
            entry = current if head[1] else entry
        elif current:
            lines[current].append(line)
    return lines, entry


def callees(line: str) -> list[str]:
    names = []
    for one, several in CALLED.findall(line):
        names += [one] if one else [name.strip().lstrip("%") for name in several.split(",")]
    return names


def called_order(lines: dict[str, list[str]], entry: str) -> list[str]:
    """Computations that the entry reaches, callers before callees."""
    done: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        for line in lines.get(name, ()):
            for callee in callees(line):
                visit(callee)
        done.append(name)

    visit(entry)
    return done[::-1]
