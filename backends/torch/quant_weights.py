"""Loads weights in few bits: gathers the tensors of one, makes a QuantWeight of them, joins what is fused.

Called by weights.py for each parameter that belongs to such a weight. A weight is turned as soon as its last tensor has
come, so that no more is held twice than the weights that are begun.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from backends.torch.device import choose_device
from cuda_kernels import quant_reference
from cuda_kernels.dispatch import quant_products, settle
from cuda_kernels.quant_layout import joined, nibble_weight, plain_weight, round_to_fp8
from cuda_kernels.quant_weight import QuantWeight, Weight
from engine.runner import RunnerConfig
from engine.specs.arch import ArchSpec
from engine.specs.quant import WeightQuant, stored_sizes
from engine.specs.weights import ParamSpec, param_table

MOST_ROWS = 128  # of quant_linear.py's own kernels; more may take a weight turned back


class QuantLoad:
    """The weights of a model that are not plain, while they come.

    stored: parameter's weight ("layers.0.q") -> name of what it is stored in ("layers.0.qkv").
    """

    def __init__(self, arch: ArchSpec, stored: dict[str, str], dtype: torch.dtype) -> None:
        self.stored = stored
        self.dtype = dtype
        self.fields_left: dict[str, int] = {}
        self.parts: dict[str, dict[str, QuantWeight | Tensor | None]] = {}  # of what is stored, top to bottom
        self.fields: dict[str, dict[str, Tensor]] = {}
        table = param_table(arch)
        quantised = {stored[param.weight] for param in table if param.quant is not None}
        for param in table:
            name = stored[param.weight]
            if name in quantised:
                self.fields_left[param.weight] = self.fields_left.get(param.weight, 0) + 1
                self.parts.setdefault(name, {})[param.weight] = None

    def takes(self, param: ParamSpec) -> bool:
        """Whether the parameter belongs to a weight that is not plain, or is fused with one."""
        return param.weight in self.fields_left

    def add(self, param: ParamSpec, numbers: Tensor) -> tuple[str, Weight] | None:
        """Take one tensor; -> (stored name, weight) when it was the last of its weight. numbers: on the device."""
        fields = self.fields.setdefault(param.weight, {})
        fields[param.field] = numbers
        if len(fields) < self.fields_left[param.weight]:
            return None
        name = self.stored[param.weight]
        parts = self.parts[name]
        parts[param.weight] = build(param.quant, self.fields.pop(param.weight), self.dtype)
        done = [part for part in parts.values() if part is not None]
        if len(done) < len(parts):
            return None
        del self.parts[name]
        return name, settle(joined(done), self.dtype)


def kept_sizes(arch: ArchSpec, stored: Callable[[str], str], item: int) -> dict[str, list[int]]:
    """Bytes of each tensor of the weights that are not plain, or fused with one, on a GPU. item: bytes of x's dtype.

    stored: as QuantLoad has it, as a function.
    """
    table = param_table(arch)
    quants = {param.weight: param.quant for param in table if param.quant is not None}
    names = {stored(weight) for weight in quants}
    sizes: dict[str, list[int]] = {}
    for param in param_table(replace(arch, quant=None)):
        if stored(param.name) in names:
            parts = stored_sizes(quants.get(param.name), param.shape[0], param.shape[1], item)
            sizes.setdefault(stored(param.name), []).extend(parts)
    return sizes


def product_bytes(config: RunnerConfig, stored: Callable[[str], str], item: int, tokens: int) -> int:
    """What the largest product with a weight in few bits takes beside its inputs and its result. item: bytes of x's."""
    arch, device = config.arch, choose_device(config.device)
    quants = {param.weight: param.quant for param in param_table(arch) if param.quant is not None}
    forms: dict[str, set[WeightQuant | None]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for param in param_table(replace(arch, quant=None)):
        if len(param.shape) == 2:
            name = stored(param.name)
            forms.setdefault(name, set()).add(quants.get(param.name))
            shapes[name] = (shapes.get(name, (0, 0))[0] + param.shape[0], param.shape[1])
    kept = [name for name, found in forms.items() if found != {None}]
    return max((scratch_bytes(forms[name], shapes[name], item, tokens, device) for name in kept), default=0)


def scratch_bytes(
    forms: set[WeightQuant | None], shape: tuple[int, int], item: int, tokens: int, device: torch.device
) -> int:
    """Of one product. forms: of its parts; shape: (O, I) of all."""
    rows, inner = shape
    quants = [quant for quant in forms if quant is not None]
    if any(quant_products(quant.scheme, device) is quant_reference for quant in quants):
        return rows * inner * (4 + item) + 12 * tokens * (rows + inner)
    apart = len(forms) > 1 or any(quant.act_order or quant.per == "block" for quant in quants)  # outputs are joined
    turned = tokens > MOST_ROWS and any(quant.act == "none" for quant in quants)
    return tokens * (inner + rows * apart) * item + turned * rows * inner * item


def build(quant: WeightQuant | None, fields: dict[str, Tensor], dtype: torch.dtype) -> QuantWeight | Tensor:
    """One weight from the tensors that the checkpoint has of it."""
    if quant is None:
        return fields[""].to(dtype)
    if quant.at_load:
        return round_to_fp8(fields[""])
    if quant.scheme != "w4":
        return plain_weight(quant.scheme, quant.act, fields, quant.per == "block")
    return nibble_weight(quant.layout, fields, quant.group, quant.zero_bias, dtype)
