"""Orbax checkpoints: written in parts by `twinfer convert`, read by restore.py straight into sharded arrays.

Arrays are the logical parameters of specs/weights.py in the checkpoint's own dtype; each device reads its shard alone.
A part is at most PART_BYTES (or one parameter), which bounds host memory on both sides. specs/manifest.py says what is
where and has checked it before anything here reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from engine.errors import CheckpointError
from engine.specs.arch import ArchSpec
from engine.specs.manifest import Part, list_files, read_manifest
from engine.specs.weights import DTYPE_BYTES, ParamSpec, RawTensor, param_table

PART_BYTES = 1 << 30
CHUNK_BYTES = 4 << 20  # what is read together; a device that reads a part of an array reads whole chunks
NUMPY_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
Progress = Callable[[str, int, int], None]
Place = tuple[tuple[int, ...], jax.sharding.Sharding]


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
    chunked = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in tree}
    # compressed weights are a fifth smaller and take twice as long to read
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save((target / folder).absolute(), args=ocp.args.PyTreeSave(tree, save_args=chunked))
    dtypes = tuple((name, tensor.dtype) for name, tensor in tensors.items())
    return Part(folder=folder, params=dtypes, files=list_files(target / folder))


def read_params(
    path: Path,
    arch: ArchSpec,
    place_of: Callable[[ParamSpec], Place],
    progress: Progress | None = None,
) -> Iterator[tuple[ParamSpec, jax.Array]]:
    """Each parameter of `arch` once, in its checkpoint's dtype, in the shape and place of `place_of`.

    A shape may reach beyond a parameter's end: zeros there. In a process of many, all processes call this together,
    with shardings over all devices. Raises CheckpointError.
    """
    parts = read_manifest(path, arch)
    table = {param.name: param for param in param_table(arch)}
    total = sum(table[name].num_elements * DTYPE_BYTES[dtype] for part in parts for name, dtype in part.params)
    done = 0
    for part in parts:
        arrays = restore_part(path / part.folder, part, table, place_of)
        for name, dtype in part.params:
            done += table[name].num_elements * DTYPE_BYTES[dtype]
            if progress is not None:
                progress("weights", done, total)
            yield table[name], arrays.pop(name)


def restore_part(
    folder: Path, part: Part, table: dict[str, ParamSpec], place_of: Callable[[ParamSpec], Place]
) -> dict[str, jax.Array]:
    wanted = {}
    for name, dtype in part.params:
        shape, sharding = place_of(table[name])
        wanted[name] = jax.ShapeDtypeStruct(shape, NUMPY_DTYPES[dtype], sharding=sharding)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            # Orbax would pad, cut or cast without a word: what is stored is compared here.
            stored = checkpointer.metadata(folder.absolute()).item_metadata.tree
            for name, abstract in wanted.items():
                found, shape = stored.get(name), table[name].shape
                if found is None or found.shape != shape or found.dtype != abstract.dtype:
                    raise CheckpointError(
                        f"{folder}: {name}: stored as {found}, the manifest says {abstract.dtype} {shape}"
                    )
            restored: dict[str, jax.Array] = checkpointer.restore(folder.absolute(), wanted, strict=False)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder}: damaged ({str(error).splitlines()[0]}); convert the model again") from error
    return restored
