"""From an Orbax checkpoint to the parameters as the runner stores them, each device reading its own part.

Nothing crosses devices: what is fused is joined on the device that has read it. Called by load.py, which imports it
only when it is needed: Orbax is an extra of the package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from backends.jax.orbax import Progress, read_params
from backends.jax.split import AXIS, Split, as_stored, read_place
from backends.jax.stacks import Store
from backends.jax.weights import storage
from engine.errors import check
from engine.specs.arch import ArchSpec


def load(path: Path, arch: ArchSpec, dtype: str, split: Split, progress: Progress | None = None) -> dict[str, Any]:
    """The parameters as the runner stores them: converted, and fused where Storage says so, each device its part."""
    places = storage(arch, split.platform, split.size)
    waiting = Counter(place.name for place in places.values())
    rows: dict[str, list[tuple[int, jax.Array]]] = {}
    store = Store(arch, split)
    for param, array in read_params(path, arch, lambda param: read_place(param, split), progress):
        place = places[param.name]
        rows.setdefault(place.name, []).append((place.start, as_stored(array, param, split)))
        waiting[place.name] -= 1
        if not waiting[place.name]:
            parts = [part for _, part in sorted(rows.pop(place.name), key=lambda item: item[0])]
            store.put(place.name, fuse(parts, dtype, place.spec, split), place.spec)
    check(not rows, f"parameters are incomplete: {sorted(rows)}")
    return store.tree({place.name for place in places.values()})


def fuse(parts: list[jax.Array], dtype: str, spec: PartitionSpec, split: Split) -> jax.Array:
    """Rows one after another, on each device its own, as numbers of `dtype`."""
    if split.size > 1 and AXIS in spec and len(parts) > 1:
        return joined_parts(dtype, split.mesh, spec)(*parts)
    whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return whole.astype(dtype)


@cache
def joined_parts(dtype: str, mesh: Mesh, spec: PartitionSpec) -> Callable[..., jax.Array]:
    """Joins arrays that lie as `spec`; a device's rows stay on it."""

    def join(*parts: jax.Array) -> jax.Array:
        return jnp.concatenate(parts).astype(dtype)

    joined: Callable[..., jax.Array] = jax.jit(jax.shard_map(join, mesh=mesh, in_specs=spec, out_specs=spec))
    return joined
