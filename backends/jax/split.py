"""How one process spreads a model over its devices: a mesh, and where each array lies on it.

The forward program is written for one device's part and runs under `shard_map` (forward.py): heads, ffn and vocabulary
are split over the axis "model", what a device computes alone is summed where a layer needs the whole. Everything else
(sampling, scoring, table updates) is an ordinary program that XLA partitions. Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from engine.specs.parallel import shard_shape, shard_slices
from engine.specs.weights import ParamSpec

AXIS = "model"
DATA = "data"  # replicas, see replicas.py
SPLIT_AXES = ("heads", "kv_heads", "ffn", "vocab")


class Split:
    """devices: of each replica those that share every layer, one replica after another."""

    def __init__(self, devices: Sequence[jax.Device], replicas: int = 1) -> None:
        self.devices = tuple(devices)
        self.device = devices[0]
        self.platform = self.device.platform
        self.replicas = replicas
        self.size = len(devices) // replicas
        self.mesh = Mesh(np.array(devices).reshape(replicas, -1), (DATA, AXIS))

    def sharding(self, spec: PartitionSpec | None = None) -> Sharding:
        """Of an array that lies as `spec` says, None: whole on each device."""
        if len(self.devices) == 1:
            return SingleDeviceSharding(self.device)
        return NamedSharding(self.mesh, PartitionSpec() if spec is None else spec)

    def shape(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(spec))


def param_spec(param: ParamSpec) -> PartitionSpec:
    return PartitionSpec(*(AXIS if axis in SPLIT_AXES else None for axis in param.axes))


def rank_rows(param: ParamSpec, ranks: int) -> list[slice]:
    """The rows of each rank; one slice where rows are not split. The last ranks of a vocabulary may have fewer."""
    if ranks == 1:
        return [slice(0, param.shape[0])]
    rows = [shard_slices(param, ranks, rank)[0] for rank in range(ranks)]  # which refuses cuts of any axis
    return rows if param.axes[0] in SPLIT_AXES else rows[:1]


def read_place(param: ParamSpec, split: Split) -> tuple[tuple[int, ...], Sharding]:
    """Shape and sharding under which each device reads its own part of `param`, and no more.

    A vocabulary has rows behind its end where it is not divided evenly. Heads that neighbours share lie on a mesh of
    (heads, neighbours). Replicas read the same.
    """
    if split.size == 1:
        return param.shape, split.sharding()
    part = shard_shape(param, split.size, 0)
    counts = [1] * len(part)  # different parts of each axis
    for axis, name in enumerate(param.axes):
        if name in SPLIT_AXES:
            counts[axis] = split.size if name != "kv_heads" else param.shape[axis] // part[axis]
    devices = split.mesh.devices.reshape(split.replicas, max(counts), -1)
    spec = PartitionSpec(*(AXIS if count > 1 else None for count in counts))
    shape = tuple(own * count for own, count in zip(part, counts, strict=True))
    return shape, NamedSharding(Mesh(devices, (DATA, AXIS, "neighbours")), spec)


def as_stored(array: jax.Array, param: ParamSpec, split: Split) -> jax.Array:
    """What was read by `read_place`, as the ranks' parts one after another; nothing moves."""
    if split.size == 1:
        return array
    spec, part = param_spec(param), array.sharding.shard_shape(array.shape)
    shape = tuple(own * (1 if axis is None else split.size) for own, axis in zip(part, spec, strict=True))
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, split.sharding(spec), shards)


def specs_of(tree: Any) -> Any:
    """The PartitionSpec of each array or shape of a tree."""
    return jax.tree_util.tree_map(lambda x: x.sharding.spec, tree)
