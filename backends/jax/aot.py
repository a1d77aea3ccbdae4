"""Executables built ahead: how a program becomes bytes, and how the bytes run again without a compiler.

`twinfer compile` (backends/jax/build.py) writes what `Runner.warm_up` loads; engine/specs/executables.py is the folder.
A program is the runtime's own serialised executable, no pickle. jax.experimental.serialize_executable pickles; jax's
persistent cache does not, but has to trace and lower a program to know its name. So a loaded executable is called
directly: arguments flattened, `execute_sharded`, results put into the tree that the manifest describes. That takes
four names of jaxlib's own (deserialize_executable, execute_sharded, DeviceList, batched_device_put) where rebuilding a
jax.stages.Compiled takes twenty private fields, and costs no more a call (docs/executables.md). jax and jaxlib stand
in the key, so other versions never see these bytes.

Always true: every argument is kept (`keep_unused`), so leaf n of the arguments is parameter n of the executable.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxlib import xla_client

from backends.jax.compile import Program, text_of
from backends.jax.key import key_of
from backends.jax.split import Split
from backends.jax.tables import Rows, Tables
from engine.errors import check, fail
from engine.runner import RunnerConfig
from engine.specs.executables import (
    Compiled,
    Manifest,
    canonical,
    check_key,
    digest,
    read_manifest,
    read_program,
    refuse,
)
from pallas_kernels.int8_pages import Int8Pages

RECORDS = {"Rows": Rows, "Tables": Tables, "Int8Pages": Int8Pages}

# trees as JSON


def describe(tree: Any) -> Any:
    """A tree of arrays as JSON: {"list" | "tuple" | "dict" | a record's name: parts}; a leaf is [dtype, shape]."""
    match tree:
        case dict():
            return {"dict": {name: describe(part) for name, part in tree.items()}}
        case list():
            return {"list": [describe(part) for part in tree]}
        case tuple():
            return {"tuple": [describe(part) for part in tree]}
        case Rows() | Tables() | Int8Pages():
            return {type(tree).__name__: {part.name: describe(getattr(tree, part.name)) for part in fields(tree)}}
    return [np.dtype(tree.dtype).name, list(tree.shape)]


def restore(node: Any) -> Any:
    """The tree that `describe` made text of, with shapes for arrays. Raises what malformed text raises."""
    if isinstance(node, list):
        dtype, shape = node
        return jax.ShapeDtypeStruct(shape, dtype)
    ((kind, parts),) = node.items()
    match kind:
        case "list":
            return [restore(part) for part in parts]
        case "tuple":
            return tuple(restore(part) for part in parts)
        case "dict":
            return {name: restore(part) for name, part in parts.items()}
    return RECORDS[kind](**{name: restore(part) for name, part in parts.items()})


def args_digest(program: Program) -> str:
    return digest(canonical(describe(program.args)))


# programs


def serialise(program: Program, compiled: jax.stages.Compiled) -> Compiled:
    executable = compiled.runtime_executable()
    leaves = len(jax.tree_util.tree_leaves(program.args))
    check(len(executable.get_parameter_layouts()) == leaves, f"{program.name} has hidden parameters")
    return text_of(program.name), executable.serialize(), args_digest(program), describe(compiled.out_info)


class Loaded:
    """A program of a bundle, called as the compiled one would be: device arrays and trees of them, or numpy arrays.

    A dict as the first argument is the parameters: its leaves are listed once for as long as it is the same object, so
    it is never changed in place.
    """

    def __init__(self, executable: Any, program: Program, out: Any, split: Split) -> None:
        self._executable = executable
        self._execute = executable.execute_sharded
        self._devices = list(split.devices)
        # arguments that may come from the host: which, of what shape, where they lie, which part on each device
        self._hosted = []
        for index, arg in enumerate(program.args):
            if isinstance(arg, jax.ShapeDtypeStruct):
                sharding = arg.sharding or split.sharding()
                parts = sharding.devices_indices_map(arg.shape)
                own = [parts[device] for device in self._devices]
                self._hosted.append((index, jax.core.ShapedArray(arg.shape, arg.dtype), sharding, own))
        self._out = jax.tree_util.tree_structure(out)
        self._results = results_of(out, program, split)
        self._params: dict[str, Any] = {}
        self._param_leaves: list[Any] = []

    def __call__(self, *args: Any) -> Any:
        given = list(args)
        for index, aval, sharding, parts in self._hosted:
            array = given[index]
            if isinstance(array, np.ndarray):
                if array.shape != aval.shape or array.dtype != aval.dtype:
                    fail(f"argument {index} is {array.dtype} {array.shape}, not {aval}")
                copies = [array[part] for part in parts]
                given[index] = xla_client.batched_device_put(aval, sharding, copies, self._devices)
        results = self._execute(self._leaves(given)).disassemble_into_single_device_arrays()
        if len(self._devices) == 1:
            return jax.tree_util.tree_unflatten(self._out, [shards[0] for shards in results])
        whole = [
            jax.make_array_from_single_device_arrays(shape, sharding, shards)
            for (shape, sharding), shards in zip(self._results, results, strict=True)
        ]
        return jax.tree_util.tree_unflatten(self._out, whole)

    def _leaves(self, given: list[Any]) -> list[Any]:
        if not given or not isinstance(given[0], dict):
            return jax.tree_util.tree_leaves(given)
        if given[0] is not self._params:
            self._params, self._param_leaves = given[0], jax.tree_util.tree_leaves(given[0])
        return self._param_leaves + jax.tree_util.tree_leaves(given[1:])

    def memory_analysis(self) -> Any:
        return self._executable.get_compiled_memory_stats()


def results_of(out: Any, program: Program, split: Split) -> list[tuple[tuple[int, ...], jax.sharding.Sharding]]:
    """Shape and place of each result. out: their tree, as shapes."""
    outs = split.sharding() if program.outs is None else program.outs

    found: list[tuple[tuple[int, ...], jax.sharding.Sharding]] = []

    def spread(sharding: jax.sharding.Sharding, part: Any) -> None:
        found.extend((leaf.shape, sharding) for leaf in jax.tree_util.tree_leaves(part))

    jax.tree_util.tree_map(spread, outs, out)
    return found


@dataclass(frozen=True, slots=True)
class Bundle:
    """An open bundle whose key fits."""

    folder: Path
    manifest: Manifest
    split: Split

    @classmethod
    def open(cls, folder: Path, config: RunnerConfig, split: Split) -> Bundle:
        """Raises ConfigError naming the field that differs."""
        manifest = read_manifest(folder)
        check_key(folder, manifest.key, key_of(config, split))
        return cls(folder, manifest, split)

    def load(self, program: Program) -> Loaded:
        """Raises ConfigError where the program is missing, damaged or made for other arguments."""
        name = text_of(program.name)
        entry, data = read_program(self.folder, self.manifest, name)
        if entry.args != args_digest(program):
            refuse(self.folder, f"program {name} was built for other arguments")
        try:
            out = restore(entry.out)
            devices = xla_client.DeviceList(self.split.devices)
            executable = self.split.device.client.deserialize_executable(data, executable_devices=devices)
            num_results = jax.tree_util.tree_structure(out).num_leaves
            if len(executable.get_output_layouts()) != num_results:
                raise ValueError(f"it gives other than {num_results} results")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            refuse(self.folder, f"program {name} does not load: {str(error).splitlines()[0][:200]}")
        return Loaded(executable, program, out, self.split)
