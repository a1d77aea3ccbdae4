"""Where loaded parameters are put: an array each, or like layers in one array, filled where it lies.

A TPU's step is a scan over stacked weights (jax_models/scanned.py), a GPU's takes norms from stacks; nothing is ever
held twice, since a stack is allocated whole and each layer is written into it by a program that takes its memory over.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from backends.jax.mesh import stacks_layers, stacks_norms
from backends.jax.split import Split
from engine.errors import check
from engine.specs.arch import ArchSpec
from engine.specs.weights import param_table


class Store:
    """Takes stored parameters by name ("layers.3.qkv"), gives the tree that jax_models takes."""

    def __init__(self, arch: ArchSpec, split: Split) -> None:
        self._arch = arch
        self._split = split
        self._flat: dict[str, Any] = {}
        self._fill: dict[str, Any] = {}
        self._stacks = stack_places(arch)
        self._names: set[str] = set()

    def put(self, name: str, numbers: Any, spec: PartitionSpec) -> None:
        """numbers: an array of the host or of the devices."""
        self._names.add(name)
        layer, part = split_name(name)
        placed = jax.device_put(numbers, self._split.sharding(spec))
        if not is_stacked(name, self._split.platform):
            self._flat[name] = placed
            return
        stack, index = self._stacks[layer]
        length = sum(other == stack for other, _ in self._stacks.values())
        key, sharding = f"stacks.{stack}.{part}", self._split.sharding(PartitionSpec(None, *spec))
        if key not in self._flat:
            shape, dtype = (length, *numbers.shape), numbers.dtype
            self._flat[key] = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
            self._fill[key] = jax.jit(fill, donate_argnums=0, out_shardings=sharding)
        self._flat[key] = self._fill[key](self._flat[key], placed, index)

    def tree(self, wanted: set[str]) -> dict[str, Any]:
        """wanted: the names that must have come."""
        check(self._names == wanted, f"parameters are missing or not known: {sorted(self._names ^ wanted)[:5]}")
        return tree(self._arch, self._flat)


def fill(stack: jax.Array, numbers: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(stack, numbers, index, 0)


def is_stacked(name: str, platform: str) -> bool:
    """Whether the array `name` is kept in a stack of layers."""
    if not name.startswith("layers."):
        return False
    return stacks_layers(platform) or (stacks_norms(platform) and name.endswith("_norm"))


def split_name(name: str) -> tuple[int, str]:
    """ "layers.3.qkv" -> (3, "qkv"); other names -> (-1, name)."""
    if not name.startswith("layers."):
        return -1, name
    _, index, part = name.split(".")
    return int(index), part


def stack_places(arch: ArchSpec) -> dict[int, tuple[int, int]]:
    """Layer -> (number of its stack, index in it). Layers whose parameters have the same shapes share a stack."""
    shapes: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for param in param_table(arch):
        layer, part = split_name(param.weight)
        if layer >= 0:  # of weights in few bits each tensor, with its form
            shapes.setdefault(layer, []).append((f"{part} {param.field} {param.quant}", param.shape))
    members: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
    for layer in sorted(shapes):
        members.setdefault(tuple(shapes[layer]), []).append(layer)
    return {
        layer: (number, index) for number, layers in enumerate(members.values()) for index, layer in enumerate(layers)
    }


def tree(arch: ArchSpec, flat: dict[str, Any]) -> dict[str, Any]:
    """{"layers.3.qkv": x} -> {"layers": [.., {"qkv": x}]}; {"stacks.0.qkv": x} -> {"stacks": [{"qkv": x}]}."""
    layers: list[dict[str, Any]] = [{} for _ in arch.layers]
    stacks: dict[int, dict[str, Any]] = {}
    params: dict[str, Any] = {}
    for name, value in flat.items():
        match name.split("."):
            case ["layers", index, part]:
                params["layers"] = layers
                layers[int(index)][part] = value
            case ["stacks", number, part]:
                stacks.setdefault(int(number), {})[part] = value
            case _:
                params[name] = value
    if stacks:
        params["stacks"] = [stacks[number] for number in sorted(stacks)]
    return params


def whole_layers(
    params: dict[str, Any], places: dict[int, tuple[int, int]], rows_of: Collection[str]
) -> dict[str, Any]:
    """`params` with what layers have in stacks among their parts: arrays, but (stack, index) of the parts `rows_of`."""
    if "stacks" not in params:
        return params
    layers = []
    for layer, parts in enumerate(params["layers"]):
        stack, index = places[layer]
        own = {
            part: (array, index) if part in rows_of else array[index] for part, array in params["stacks"][stack].items()
        }
        layers.append({**parts, **own})
    return {**params, "layers": layers}


def abstract(arch: ArchSpec, shapes: dict[str, jax.ShapeDtypeStruct], split: Split) -> dict[str, Any]:
    """The tree of a Store as shapes, for programs compiled before weights are there. shapes: by stored name."""
    places, flat = stack_places(arch), {}
    for name, shape in shapes.items():
        layer, part = split_name(name)
        if is_stacked(name, split.platform):
            stack = places[layer][0]
            length = sum(other == stack for other, _ in places.values())
            spec = PartitionSpec(None, *(shape.sharding.spec if len(split.devices) > 1 else ()))
            flat[f"stacks.{stack}.{part}"] = split.shape((length, *shape.shape), shape.dtype, spec)
        else:
            flat[name] = shape
    return tree(arch, flat)
