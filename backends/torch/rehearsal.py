"""A model cut down for a moment to the layers that differ: every kernel of it, in a fraction of the launches.

Used while kernels are listed, compiled and loaded (backends/torch/{gpu,graphs}.py), where results do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from torch_models.fused import FusedDecoder


@contextmanager
def one_layer_of_each_kind(fused: FusedDecoder, places: list[tuple[int, int, int]]) -> Iterator[None]:
    """Inside, `fused` has one layer of each kind and `places` are theirs; both are as they were behind it."""
    layers, everywhere = fused.layers, list(places)
    kinds = {}
    for (layer, heads), place in zip(layers, everywhere, strict=True):
        weights = (layer.mixer.qkv, layer.mixer.o, layer.ffn.gate_up, layer.ffn.down)
        kept = tuple(str(weight.dtype) if isinstance(weight, Tensor) else str(type(weight)) for weight in weights)
        # the first layer of a pool has launches of its own
        kinds.setdefault((layer.spec, place[0], place[2] > 0, kept), ((layer, heads), place))
    fused.layers, places[:] = [layer for layer, _ in kinds.values()], [place for _, place in kinds.values()]
    try:
        yield
    finally:
        fused.layers, places[:] = layers, everywhere
