"""Which part of each parameter a tensor-parallel rank holds, as slices of the logical shape.

Heads, KV heads, the ffn width and the vocabulary are split; everything else is whole on each rank. With more ranks than
KV heads, ranks / heads neighbours hold the same head. The vocabulary is split in equal rows, rounded up, so that the
last ranks may hold fewer (or no) rows: a backend pads them.
"""

from __future__ import annotations

from dataclasses import replace

from engine.errors import ConfigError
from engine.specs.arch import ArchSpec
from engine.specs.weights import ParamSpec


def check_parallel(arch: ArchSpec, tensor_size: int) -> None:
    """Raise ConfigError unless every head and ffn of `arch` can be split over `tensor_size` ranks."""
    if tensor_size < 1:
        raise ConfigError(f"--tensor-parallel-size: {tensor_size} is not accepted; expected an integer >= 1")
    for layer in arch.layers:
        heads, kv_heads, ffn = layer.mixer.num_heads, layer.mixer.num_kv_heads, layer.ffn.size
        for name, size in (("attention heads", heads), ("ffn columns", ffn)):
            if size % tensor_size:
                raise ConfigError(
                    f"--tensor-parallel-size: {tensor_size} does not divide {size} {name}; expected a divisor"
                )
        if kv_heads % tensor_size and tensor_size % kv_heads:
            raise ConfigError(
                f"--tensor-parallel-size: {tensor_size} neither divides {kv_heads} KV heads nor is a multiple of them"
            )


def shard_slices(param: ParamSpec, tensor_size: int, tensor_rank: int) -> tuple[slice, ...]:
    """The rows and columns of `param` that rank `tensor_rank` of `tensor_size` holds. Raises ConfigError."""
    if not 0 <= tensor_rank < tensor_size:
        raise ConfigError(f"tensor rank: {tensor_rank} is not accepted; expected 0 to {tensor_size - 1}")
    units, spans = param.units or (1,) * len(param.shape), param.spans or param.shape
    return tuple(
        shard_range(param, axis, span, unit, (tensor_size, tensor_rank))
        for axis, span, unit in zip(param.axes, spans, units, strict=True)
    )


def shard_range(param: ParamSpec, axis: str, span: int, unit: int, place: tuple[int, int]) -> slice:
    """One axis of one rank. Half-open; empty where a short vocabulary has run out.

    span: length of the axis, in rows or inputs; unit: how many of them an index covers. place: (ranks, rank).
    """
    ranks, rank = place
    if axis == "vocab":
        rows = -(-span // ranks)
        return cut(param, (min(rank * rows, span), min((rank + 1) * rows, span)), span, unit, ranks)
    if axis not in ("heads", "kv_heads", "ffn"):
        return slice(0, -(-span // unit))
    granules = span // param.granule
    if axis == "kv_heads" and ranks > granules and ranks % granules == 0:
        head = rank // (ranks // granules)  # neighbours share a head
        return cut(param, (head * param.granule, (head + 1) * param.granule), span, unit, ranks)
    if granules % ranks:
        raise ConfigError(
            f"--tensor-parallel-size: {ranks} does not divide the {granules} {axis} units of {param.name}"
        )
    width = granules // ranks * param.granule
    return cut(param, (rank * width, (rank + 1) * width), span, unit, ranks)


def cut(param: ParamSpec, part: tuple[int, int], span: int, unit: int, ranks: int) -> slice:
    """[start, stop) of an axis in indexes of `unit` each. Raises ConfigError where a cut is inside one."""
    start, stop = part
    if start % unit or (stop % unit and stop != span):
        raise ConfigError(f"--tensor-parallel-size: {ranks} cuts {param.name} inside {unit} that belong together")
    return slice(start // unit, -(-stop // unit))


def shard_shape(param: ParamSpec, tensor_size: int, tensor_rank: int) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in shard_slices(param, tensor_size, tensor_rank))


def rank_arch(arch: ArchSpec, tensor_size: int) -> ArchSpec:
    """`arch` as rank 0 of `tensor_size` holds it: its heads, ffn columns and rows of the vocabulary; checked to split.

    Its parameters have the shapes of shard_shape; the last ranks may have fewer rows of the vocabulary.
    """
    check_parallel(arch, tensor_size)
    layers = tuple(
        replace(
            layer,
            mixer=replace(
                layer.mixer,
                num_heads=layer.mixer.num_heads // tensor_size,
                num_kv_heads=max(1, layer.mixer.num_kv_heads // tensor_size),
            ),
            ffn=replace(layer.ffn, size=layer.ffn.size // tensor_size),
        )
        for layer in arch.layers
    )
    return replace(arch, layers=layers, vocab_size=-(-arch.vocab_size // tensor_size))
