"""Orbax checkpoints: written in parts by `twinfer convert`, restored by the JAX runner straight into sharded arrays.

Arrays are the logical parameters of specs/weights.py in the checkpoint's own dtype; each device reads its shard alone.
A part is at most PART_BYTES (or one parameter), which bounds host memory on both sides. specs/manifest.py says what is
where and has checked it before anything here reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from backends.jax.split import Split
from backends.jax.stacks import Store
from backends.jax.weights import storage
from engine.errors import CheckpointError, ConfigError, check
from engine.specs.arch import ArchSpec
from engine.specs.manifest import Part, list_files, read_manifest
from engine.specs.weights import DTYPE_BYTES, ParamSpec, RawTensor, param_table

PART_BYTES = 1 << 30
NUMPY_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
Progress = Callable[[str, int, int], None]


def write(target: Path, params: Iterator[tuple[ParamSpec, RawTensor]], part_bytes: int = PART_BYTES) -> list[Part]:
    """Write every parameter under `target`, in parts. The caller completes the folder with the manifest."""
    parts: list[Part] = []
    held: dict[str, RawTensor] = {}
    for param, tensor in params:
        if held and sum(other.data.nbytes for other in held.values()) + tensor.data.nbytes > part_bytes:
            parts.append(write_part(target, len(parts), held))
            held = {}
        held[param.name] = tensor
    return [*parts, write_part(target, len(parts), held)]


def write_part(target: Path, index: int, tensors: dict[str, RawTensor]) -> Part:
    folder = f"params-{index:05d}"
    tree = {
        name: tensor.data.view(ml_dtypes.bfloat16) if tensor.dtype == "bfloat16" else tensor.data
        for name, tensor in tensors.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((target / folder).absolute(), tree)
    dtypes = tuple((name, tensor.dtype) for name, tensor in tensors.items())
    return Part(folder=folder, params=dtypes, files=list_files(target / folder))


def read_params(
    path: Path,
    arch: ArchSpec,
    sharding_of: Callable[[ParamSpec], jax.sharding.Sharding],
    progress: Progress | None = None,
) -> Iterator[tuple[ParamSpec, jax.Array]]:
    """Each parameter of `arch` once, in its checkpoint's dtype and placed by `sharding_of`. Raises CheckpointError.

    In a process of many, all processes call this together, with shardings over all devices.
    """
    parts = read_manifest(path, arch)
    table = {param.name: param for param in param_table(arch)}
    total = sum(table[name].num_elements * DTYPE_BYTES[dtype] for part in parts for name, dtype in part.params)
    done = 0
    for part in parts:
        arrays = restore_part(path / part.folder, part, table, sharding_of)
        for name, dtype in part.params:
            done += table[name].num_elements * DTYPE_BYTES[dtype]
            if progress is not None:
                progress("weights", done, total)
            yield table[name], arrays.pop(name)


def load(path: Path, arch: ArchSpec, dtype: str, split: Split, progress: Progress | None = None) -> dict[str, Any]:
    """The parameters as the runner stores them: converted, and fused where Storage says so."""
    if split.size > 1:
        raise ConfigError(
            f"--load-format: orbax with --tensor-parallel-size {split.size} is not supported yet; use safetensors"
        )
    places = storage(arch, split.platform)
    sharding = split.sharding()
    rows: dict[str, list[tuple[int, jax.Array]]] = {}
    store = Store(arch, split)
    for param, array in read_params(path, arch, lambda _: sharding, progress):
        place = places[param.name]
        parts = rows.setdefault(place.name, [])
        parts.append((place.start, array.astype(dtype)))
        if sum(part.shape[0] for _, part in parts) == place.rows:
            ordered = [part for _, part in sorted(rows.pop(place.name), key=lambda item: item[0])]
            store.put(place.name, ordered[0] if len(ordered) == 1 else jnp.concatenate(ordered), place.spec)
    check(not rows, f"parameters are incomplete: {sorted(rows)}")
    return store.tree({place.name for place in places.values()})


def restore_part(
    folder: Path, part: Part, table: dict[str, ParamSpec], sharding_of: Callable[[ParamSpec], jax.sharding.Sharding]
) -> dict[str, jax.Array]:
    wanted = {
        name: jax.ShapeDtypeStruct(table[name].shape, NUMPY_DTYPES[dtype], sharding=sharding_of(table[name]))
        for name, dtype in part.params
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            # Orbax would pad, cut or cast without a word: strict refuses shapes, and dtypes are compared here.
            stored = checkpointer.metadata(folder.absolute()).item_metadata.tree
            for name, abstract in wanted.items():
                found = stored.get(name)
                if found is None or found.shape != abstract.shape or found.dtype != abstract.dtype:
                    raise CheckpointError(f"{folder}: {name}: stored as {found}, the manifest says {abstract}")
            restored: dict[str, jax.Array] = checkpointer.restore(folder.absolute(), wanted)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder}: damaged ({str(error).splitlines()[0]}); convert the model again") from error
    return restored
