"""How this backend stores parameters: the Storage table, logical -> stored, and the loader that goes through it.

q, k and v are rows of one array, gate and up of another: fewer and larger products. Everything else is stored as it is
named, [out, in], in the activation dtype. Called by the runner's load.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from numpy.typing import NDArray

from backends.jax.quant_weights import FUSED_INTO, QuantLoad, check_equal, convert, kept_params
from backends.jax.split import Split, param_spec, rank_rows
from backends.jax.stacks import Store, abstract
from engine.errors import check
from engine.specs.arch import ArchSpec
from engine.specs.weights import ParamSpec, RawTensor


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows [start, start + its own height) of each rank's part of the array `name`; a part is `rows` high."""

    name: str
    start: int
    rows: int
    spec: PartitionSpec


def storage(arch: ArchSpec, platform: str, ranks: int = 1) -> dict[str, Stored]:
    """Name of an array that is kept -> where it is stored. A split array is the ranks' parts in turn, each fused."""
    heights: dict[str, int] = {}
    places: list[tuple[ParamSpec, str, int]] = []
    params = [param for param, _ in kept_params(arch, platform)]
    for param in params:
        stem, _, part = param.name.rpartition(".")
        stored = FUSED_INTO.get(part, part) if stem else part
        name = f"{stem}.{stored}" if stem else stored
        places.append((param, name, heights.get(name, 0)))
        heights[name] = heights.get(name, 0) + rank_height(param, ranks)
    return {param.name: Stored(name, start, heights[name], param_spec(param)) for param, name, start in places}


def rank_height(param: ParamSpec, ranks: int) -> int:
    first = rank_rows(param, ranks)[0]
    return int(first.stop - first.start)


def stored_shapes(arch: ArchSpec, dtype: str, split: Split) -> dict[str, jax.ShapeDtypeStruct]:
    """Stored name -> shape and where it lies."""
    places = storage(arch, split.platform, split.size)
    found: dict[str, jax.ShapeDtypeStruct] = {}
    for param, own in kept_params(arch, split.platform):
        place = places[param.name]
        height = place.rows * len(rank_rows(param, split.size))
        found[place.name] = split.shape((height, *param.shape[1:]), own or dtype, place.spec)
    return found


def param_shapes(arch: ArchSpec, dtype: str, split: Split) -> dict[str, Any]:
    """What load_params gives, as shapes and dtypes."""
    return abstract(arch, stored_shapes(arch, dtype, split), split)


def load_params(
    arch: ArchSpec, stream: Iterator[tuple[ParamSpec, RawTensor]], dtype: str, split: Split
) -> dict[str, Any]:
    """The parameters on the devices, in the tree that jax_models.decoder.Params describes."""
    places = storage(arch, split.platform, split.size)
    waiting = Counter(place.name for place in places.values())
    kept = {param.name: param for param, _ in kept_params(arch, split.platform)}
    quantised = QuantLoad(arch, dtype, split.platform)
    partial: dict[str, NDArray[Any]] = {}
    store = Store(arch, split)
    for source, tensor in stream:
        plain = source.quant is None
        arrays = {source.name: convert(tensor, dtype)} if plain else quantised.take(source, tensor)
        for name, numbers in arrays.items():
            param, place = kept[name], places[name]
            pieces = rank_rows(param, split.size)
            waiting[place.name] -= 1
            if len(pieces) > 1 or place.rows != param.shape[0]:
                shape = (place.rows * len(pieces), *param.shape[1:])
                whole = partial.setdefault(place.name, np.zeros(shape, numbers.dtype))
                for rank, piece in enumerate(pieces):
                    start = rank * place.rows + place.start
                    whole[start : start + piece.stop - piece.start] = numbers[piece]
                if waiting[place.name]:
                    continue
                numbers = partial.pop(place.name)
            if place.name.endswith("_act_scale"):
                check_equal(place.name, numbers)
            store.put(place.name, numbers, place.spec)
    check(not partial, f"parameters are incomplete: {sorted(partial)}")
    return store.tree({place.name for place in places.values()})


def param_bytes(params: dict[str, Any]) -> int:
    """Of arrays or of shapes, on one device."""
    leaves = jax.tree_util.tree_leaves(params)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
