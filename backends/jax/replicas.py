"""Data replicas of one process: the programs of one replica run on all of them, as one program over the mesh.

What a replica has of its own (KV pages, row tables, a packed plan, logits) lies one after another along one axis of
each array, split over the mesh axis "data"; weights are the same on all. A program is written for one replica and runs
under `shard_map` over that axis; inside, tensor parallelism goes on as without replicas. Replicas of a step run the
same programs: one that has nothing to do gets arguments that change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from numpy.typing import NDArray

from backends.jax.compile import Name, Program
from backends.jax.split import AXIS, DATA, Split
from backends.jax.updates import Call

PAGES, ROWS, SECOND = 1, 0, 1
AXES: dict[str, tuple[tuple[Any, ...], Any]] = {
    "fresh": ((), (PAGES, *(ROWS,) * 4)),
    "forward": ((None, PAGES, ROWS, ROWS), (PAGES, ROWS, ROWS, ROWS, SECOND)),
    "take": ((ROWS, ROWS), ROWS),
    "score": ((None, ROWS, ROWS), ROWS),
    "sample": ((ROWS,) * 5, ROWS),
    "turns": ((None, PAGES, *(ROWS,) * 4), (PAGES, *(ROWS,) * 4)),
    "open": ((ROWS,) * 4, ROWS),
    "open_bias": ((ROWS,) * 4, ROWS),
    "open_allowed": ((ROWS,) * 3, ROWS),
    "open_bad_words": ((ROWS,) * 5, ROWS),
    "open_counts": ((ROWS,) * 5, ROWS),
    "pages": ((ROWS, SECOND), ROWS),
    "copy": ((PAGES, SECOND), PAGES),
}
"""Kind of program -> along which axis the replicas' parts of each argument and result lie; None: the same on all."""
ORDER = ("open", "open_bias", "open_allowed", "open_bad_words", "open_counts", "pages", "copy")


def spread(program: Program, split: Split) -> Program:
    """`program` of one replica, for all of them."""
    if split.replicas == 1:
        return program
    ins, results = AXES[program.name[0]]
    # with one device a replica nothing is left for the compiler to partition: kernels want that told
    manual = {DATA} if split.size > 1 else {DATA, AXIS}
    function = jax.shard_map(
        program.function,
        mesh=split.mesh,
        in_specs=tuple(spec_of(axis) for axis in ins),
        out_specs=jax.tree_util.tree_map(spec_of, results),
        axis_names=manual,
        check_vma=False,
    )
    args = tuple(
        arg if axis is None else jax.tree_util.tree_map(lambda leaf, axis=axis: longer(leaf, axis, split), arg)
        for arg, axis in zip(program.args, ins, strict=True)
    )
    outs = split.sharding() if program.outs is None else program.outs
    return replace(program, function=function, args=args, outs=places(outs, results))


def spec_of(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, DATA)


def longer(leaf: Any, axis: int, split: Split) -> jax.ShapeDtypeStruct:
    """The shape of all replicas' parts together."""
    shape = list(leaf.shape)
    shape[axis] *= split.replicas
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=over_data(leaf.sharding or split.sharding(), axis))


def over_data(sharding: Sharding, axis: int) -> NamedSharding:
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"{sharding} is on no mesh")
    spec = [*sharding.spec, *[None] * (axis + 1 - len(sharding.spec))]
    spec[axis] = DATA
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def places(outs: Any, axes: Any) -> Any:
    """Shardings of results, with the replicas along `axes`; either may be a prefix of the other."""
    if isinstance(axes, tuple):
        each = outs if isinstance(outs, tuple) else (outs,) * len(axes)
        return tuple(places(out, axis) for out, axis in zip(each, axes, strict=True))
    return jax.tree_util.tree_map(lambda sharding: over_data(sharding, axes), outs)


def together(parts: Sequence[NDArray[Any]], axis: int = 0) -> NDArray[Any]:
    """An array of each replica -> the array of all."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def part_of(array: NDArray[Any], replica: int, replicas: int, axis: int = 0) -> NDArray[Any]:
    """One replica's part of what `together` joins."""
    if replicas == 1:
        return array
    size = array.shape[axis] // replicas
    return array[(slice(None),) * axis + (slice(replica * size, (replica + 1) * size),)]


def merge_calls(calls: Sequence[list[Call]], null_slot: int) -> list[Call]:
    """The update calls of each replica as calls of all: the n-th of a name together, idle where one has fewer.

    Calls of different names keep the order of ORDER: rows are opened before what only some rows have is filled in.
    """
    if len(calls) == 1:
        return calls[0]
    names = sorted({name for own in calls for name, _ in own}, key=lambda name: (ORDER.index(name[0]), name[1:]))
    merged: list[Call] = []
    for name in names:
        columns = [[arrays for other, arrays in own if other == name] for own in calls]
        for n in range(max(map(len, columns))):
            like = next(column[n] for column in columns if len(column) > n)
            each = [column[n] if len(column) > n else idle(name, like, null_slot) for column in columns]
            axis = SECOND if name[0] in ("pages", "copy") else ROWS
            merged.append((name, tuple(together(arrays, axis) for arrays in zip(*each, strict=True))))
    return merged


def idle(name: Name, like: tuple[NDArray[Any], ...], null_slot: int) -> tuple[NDArray[Any], ...]:
    """Arguments of the shapes of `like` that change the row of padded writes alone."""
    arrays = tuple(np.zeros_like(array) for array in like)
    match name[0]:
        case "open":
            arrays[0][:, 0] = null_slot
        case "open_counts":
            arrays[0][:] = null_slot
        case "pages":
            arrays[0][0] = null_slot
        case "copy":
            pass  # no token of the null page onto itself
        case _:
            arrays[0][:] = null_slot
    return arrays
