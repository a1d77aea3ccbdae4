"""What a quantised checkpoint has beside its parameters, and what its numbers must be like; called by checkpoint.py.

Writers add tensors that say what is known already: the weight's shape, zeros of symmetric weights, biases of layers
that have none. Each is read and compared: one that says something else is refused, for it would change the numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.specs.arch import ArchSpec
from engine.specs.safetensors import STORED, TensorEntry, read_tensor, refuse
from engine.specs.weights import ParamSpec, RawTensor, param_table

SHAPE = "weight_shape"
ZEROS = ("weight_zero_point", "input_zero_point", "bias")  # 0 everywhere, where they are no parameter


def quant_modules(arch: ArchSpec) -> dict[str, tuple[int, ...]]:
    """Spellings of the linear modules that are quantised in the checkpoint, with (out, in) of each."""
    modules: dict[str, tuple[int, ...]] = {}
    if arch.quant is None:
        return modules
    for param in param_table(replace(arch, quant=None)):
        names = tuple(source.name.removesuffix(".weight") for source in param.sources)
        quant = arch.quant.of(names) if len(param.shape) == 2 and param.name != "embed" else None
        if quant is not None and not quant.at_load:
            for name, source in zip(names, param.sources, strict=True):
                modules[name] = (source.rows or param.shape[0], param.shape[1])
    return modules


def check_extras(arch: ArchSpec, extras: list[TensorEntry]) -> list[TensorEntry]:
    """Read the extras of quantised modules and compare them; -> those that are none. Raises CheckpointError."""
    modules = quant_modules(arch)
    unknown = []
    for entry in extras:
        module, _, suffix = entry.name.rpartition(".")
        if module not in modules or suffix not in (SHAPE, *ZEROS) or entry.dtype not in STORED:
            unknown.append(entry)
            continue
        rows = entry.shape[0] if entry.shape else 1
        numbers = read_tensor(entry, 0, rows, entry.shape, lambda _: None).data
        if suffix == SHAPE and tuple(numbers.reshape(-1).tolist()) != modules[module]:
            refuse(entry.file, f"{entry.name}: {numbers.tolist()}, config.json means {list(modules[module])}")
        if suffix in ZEROS and any_nonzero(numbers):
            refuse(
                entry.file, f"{entry.name}: must be 0 everywhere: {arch.family} has none as config.json describes it"
            )
    return unknown


def any_nonzero(numbers: NDArray[Any]) -> bool:
    """Read as bits without the highest one: a negative zero is 0 too. numbers: any shape and type."""
    bits = numbers.reshape(-1).view(f"u{numbers.itemsize}")
    return bool((bits & np.array((1 << (8 * numbers.itemsize - 1)) - 1, bits.dtype)).any())


def check_groups(param: ParamSpec, tensor: RawTensor, entry: TensorEntry) -> None:
    """The group of each input: every group has as many inputs as the others. Raises CheckpointError."""
    size = int(param.value)
    num_groups = param.shape[0] // size
    numbers = tensor.data
    if numbers.min() < 0 or numbers.max() >= num_groups:
        refuse(entry.file, f"{entry.name}: groups {numbers.min()} to {numbers.max()}, expected 0 to {num_groups - 1}")
    counts = np.bincount(numbers, minlength=num_groups)
    if (counts != size).any():
        odd = int(np.flatnonzero(counts != size)[0])
        refuse(entry.file, f"{entry.name}: group {odd} has {counts[odd]} inputs, group_size is {size}")
