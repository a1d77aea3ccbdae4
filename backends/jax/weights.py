"""How this backend stores parameters: the Storage table, logical -> stored, and the loader that goes through it.

q, k and v are rows of one array, gate and up of another: fewer and larger products. Everything else is stored as it is
named, [out, in], in the activation dtype. Called by the runner's load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import check
from engine.specs.arch import ArchSpec
from engine.specs.weights import ParamSpec, RawTensor, from_float32, param_table, to_float32

FUSED = {
    "qkv": ("q", "k", "v"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "gate_up": ("gate", "up"),
    "gate_up_bias": ("gate_bias", "up_bias"),
}
FUSED_INTO = {part: stored for stored, parts in FUSED.items() for part in parts}


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows [start, start + its own height) of the stored array `name` hold a parameter; the array is `rows` high."""

    name: str
    start: int
    rows: int


def storage(arch: ArchSpec) -> dict[str, Stored]:
    """Parameter name -> where it is stored."""
    table = param_table(arch)
    heights: dict[str, int] = {}
    places: list[tuple[str, str, int]] = []
    for param in table:
        stem, _, part = param.name.rpartition(".")
        stored = FUSED_INTO.get(part, part) if stem else part
        name = f"{stem}.{stored}" if stem else stored
        places.append((param.name, name, heights.get(name, 0)))
        heights[name] = heights.get(name, 0) + param.shape[0]
    return {param: Stored(name, start, heights[name]) for param, name, start in places}


def load_params(
    arch: ArchSpec, stream: Iterator[tuple[ParamSpec, RawTensor]], dtype: str, device: jax.Device
) -> dict[str, Any]:
    """The parameters on the device, in the tree that jax_models.decoder.Params describes."""
    places = storage(arch)
    partial: dict[str, NDArray[Any]] = {}
    missing: dict[str, int] = {}
    flat: dict[str, jax.Array] = {}
    for param, tensor in stream:
        place = places[param.name]
        numbers = convert(tensor, dtype)
        if place.rows != param.shape[0]:
            whole = partial.setdefault(place.name, np.empty((place.rows, *param.shape[1:]), numbers.dtype))
            whole[place.start : place.start + param.shape[0]] = numbers
            missing[place.name] = missing.get(place.name, place.rows) - param.shape[0]
            if missing[place.name]:
                continue
            numbers = partial.pop(place.name)
        flat[place.name] = jax.device_put(numbers, device)
    check(not partial, f"parameters are incomplete: {sorted(partial)}")
    check(set(flat) == {place.name for place in places.values()}, "parameters are missing")
    return tree(arch, flat)


def param_shapes(arch: ArchSpec, dtype: str) -> dict[str, Any]:
    """What load_params gives, as shapes and dtypes."""
    places = storage(arch)
    flat: dict[str, jax.ShapeDtypeStruct] = {}
    for param in param_table(arch):
        place = places[param.name]
        flat[place.name] = jax.ShapeDtypeStruct((place.rows, *param.shape[1:]), dtype)
    return tree(arch, flat)


def tree(arch: ArchSpec, flat: dict[str, Any]) -> dict[str, Any]:
    """{"layers.3.qkv": x} -> {"layers": [.., {"qkv": x}]}."""
    layers: list[dict[str, Any]] = [{} for _ in arch.layers]
    params: dict[str, Any] = {"layers": layers}
    for name, value in flat.items():
        if name.startswith("layers."):
            _, index, part = name.split(".")
            layers[int(index)][part] = value
        else:
            params[name] = value
    return params


def convert(tensor: RawTensor, dtype: str) -> NDArray[Any]:
    """The numbers in the activation dtype; bfloat16 rounds to nearest even."""
    if dtype == "bfloat16":
        bits = tensor.data if tensor.dtype == "bfloat16" else from_float32(to_float32(tensor), "bfloat16")
        return bits.view(ml_dtypes.bfloat16)
    check(dtype == "float32", f"activations of {dtype}")
    return to_float32(tensor)


def param_bytes(params: dict[str, Any]) -> int:
    """Of arrays or of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(params))
