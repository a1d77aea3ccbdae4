"""Bytes that a compiled TPU program moves between HBM and the core, counted from its optimised, scheduled HLO.

An operand or result counts if its layout lies in HBM (no memory space S(n) behind the tiling). Of fusions counts what
they take: a parameter that is only sliced counts as its slices, one that is only updated in place counts nothing, and
a result that is an update in place counts as the update. Copies between HBM and VMEM count their HBM side. Loops count
their bodies times the trips that their condition compares with a constant, other loops once; of a conditional's
branches the dearest counts. Of Pallas calls only operands in HBM that the caller names as read are counted: copies
that a kernel starts itself are the caller's to add, since their number is known at run time alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

ITEM = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
ITEM |= {"u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "after-all", "partition-id",
    "opt-barrier", "async-done", "slice-done", "dynamic-slice-done", "dynamic-update-slice-done", "iota",
}  # fmt: skip
SLICES = {"dynamic-slice", "slice", "gather"}


@dataclass(slots=True)
class Op:
    """One instruction."""

    name: str
    shape: str
    kind: str
    operands: list[str]
    rest: str
    is_root: bool


@dataclass(slots=True)
class Program:
    """Computations by name, instructions in order."""

    entry: str = ""
    computations: dict[str, dict[str, Op]] = field(default_factory=dict)


def parse(text: str) -> Program:
    found, current = Program(), {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = found.computations.setdefault(head[2], {})
            found.entry = head[2] if head[1] else found.entry
            continue
        made = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ((?:\([^=]*?\)|\S+)) ([\w\-]+)\((.*)$", line)
        if made:
            inside, rest = split_call(made[5])
            operands = re.findall(r"%([\w.\-]+)", inside)
            current[made[2]] = Op(made[2], made[3], made[4], operands, inside + ")" + rest, bool(made[1]))
    return found


def split_call(text: str) -> tuple[str, str]:
    """(operands, attributes) of what stands behind an opcode's opening bracket."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:place], text[place + 1 :]
    return text, ""


def hbm_bytes(shape: str) -> int:
    """Of all arrays of a shape that lie in HBM."""
    total = 0
    for kind, sizes, layout in ARRAY.findall(shape):
        if kind in ITEM and not re.search(r"S\(\d+\)", layout):
            total += ITEM[kind] * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def all_bytes(shape: str) -> int:
    return hbm_bytes(re.sub(r"S\(\d+\)", "", shape))


def count(text: str, kernel: Callable[[Op, list[str]], int]) -> Counter[str]:
    """Bytes by instruction, "kind name" -> bytes with all trips.

    kernel: bytes of a Pallas call, given the shapes of its operands.
    """
    program, found = parse(text), Counter[str]()
    walk(program, program.entry, 1, kernel, found)
    return found


def walk(program: Program, name: str, trips: int, kernel: Callable[[Op, list[str]], int], into: Counter[str]) -> None:
    ops = program.computations[name]
    for op in ops.values():
        called = re.findall(r"(?:body|to_apply|calls)=%([\w.\-]+)", op.rest)
        if op.kind == "while":
            condition = re.search(r"condition=%([\w.\-]+)", op.rest)
            times = trips_of(program, condition[1]) if condition else 1
            walk(program, called[0], trips * times, kernel, into)
        elif op.kind == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
            names = (
                branches[1].split(",") if branches else re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", op.rest)
            )
            dearest: Counter[str] = Counter()
            for branch in names:
                tried: Counter[str] = Counter()
                walk(program, branch.strip().lstrip("%"), trips, kernel, tried)
                dearest = max(dearest, tried, key=lambda each: sum(each.values()))
            into.update(dearest)
        elif op.kind == "call":
            walk(program, called[0], trips, kernel, into)
        elif op.kind not in FREE:
            moved = of_op(program, ops, op, kernel)
            if moved:
                into[f"{op.kind} {op.name}"] += trips * moved


def trips_of(program: Program, condition: str) -> int:
    """The constant that a loop's counter is compared with; 1 where it is compared with a number of run time."""
    ops = program.computations[condition]
    root = next(op for op in ops.values() if op.is_root)
    numbers = [ops[name] for name in root.operands if name in ops and ops[name].kind == "constant"]
    if root.kind == "fusion":  # the comparison, its constant handed on or inside
        inner = re.search(r"calls=%([\w.\-]+)", root.rest)
        numbers += [op for op in program.computations[inner[1]].values() if op.kind == "constant"] if inner else []
    found = [re.match(r"(\d+)\)", op.rest) for op in numbers]
    return max((int(number[1]) for number in found if number), default=1)


def of_op(program: Program, ops: dict[str, Op], op: Op, kernel: Callable[[Op, list[str]], int]) -> int:
    shapes = [ops[name].shape for name in op.operands if name in ops]
    if op.kind == "custom-call" and "tpu_custom_call" in op.rest:
        return kernel(op, shapes)
    if op.kind in ("copy-start", "slice-start", "async-start"):
        return of_copy(op, shapes)
    if op.kind in SLICES:
        return hbm_bytes(op.shape) + (all_bytes(op.shape) if hbm_bytes(shapes[0]) else 0)
    if op.kind == "dynamic-update-slice":
        return (hbm_bytes(shapes[0]) > 0) * all_bytes(shapes[1]) + hbm_bytes(shapes[1])
    if op.kind == "fusion":
        inner = re.search(r"calls=%([\w.\-]+)", op.rest)
        if inner:
            return of_fusion(program, inner[1], op, shapes)
    return hbm_bytes(op.shape) + sum(map(hbm_bytes, shapes))


def of_copy(op: Op, shapes: list[str]) -> int:
    """An asynchronous copy: (target, source, semaphores); of a slice the target's size."""
    arrays = ARRAY.findall(op.shape)
    target = next(
        f"{kind}[{sizes}]{layout}" for kind, sizes, layout in (arrays if op.kind == "copy-start" else arrays[1:])
    )
    return hbm_bytes(target) + (all_bytes(target) if shapes and hbm_bytes(shapes[0]) else 0)


def of_fusion(program: Program, inner: str, op: Op, shapes: list[str]) -> int:
    ops = program.computations[inner]
    total = sum(read_of(program, inner, place, shape) for place, shape in enumerate(shapes))
    root = next(each for each in ops.values() if each.is_root)
    parts = [ops[name] for name in root.operands if name in ops] if root.kind == "tuple" else [root]
    results = [f"{kind}[{sizes}]{layout}" for kind, sizes, layout in ARRAY.findall(op.shape)]
    for part, result in zip(parts, results, strict=False):
        source = part
        while source.kind == "bitcast" and source.operands[0] in ops:
            source = ops[source.operands[0]]
        updated = source.kind == "dynamic-update-slice" and hbm_bytes(result)
        total += all_bytes(ops[source.operands[1]].shape) if updated else hbm_bytes(result)
    return total


def read_of(program: Program, computation: str, place: int, shape: str) -> int:
    """What a fusion reads of an operand: slices where it is only sliced, nothing where it is updated in place."""
    ops = program.computations[computation]
    given = next((op.name for op in ops.values() if op.kind == "parameter" and op.rest.startswith(f"{place})")), "")
    return min(read_by_users(program, ops, given, shape), hbm_bytes(shape))


def read_by_users(program: Program, ops: dict[str, Op], name: str, shape: str) -> int:
    total, whole = 0, hbm_bytes(shape)
    for user in ops.values() if whole else ():
        if name not in user.operands:
            continue
        inner = re.search(r"calls=%([\w.\-]+)", user.rest)
        if user.kind in SLICES and user.operands[0] == name:
            total += all_bytes(user.shape)
        elif user.kind == "bitcast" or (inner and is_bitcast(program.computations[inner[1]])):
            total += read_by_users(program, ops, user.name, shape)
        elif user.kind == "fusion" and inner:
            total += read_of(program, inner[1], user.operands.index(name), shape)
        elif not (user.kind == "dynamic-update-slice" and user.operands[0] == name):
            return whole
    return total


def is_bitcast(ops: dict[str, Op]) -> bool:
    """Whether a computation is nothing but another view of its operand."""
    return all(op.kind in ("parameter", "bitcast") for op in ops.values())
