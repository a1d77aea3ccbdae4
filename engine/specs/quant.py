"""Which weights are kept in few bits, how, and with which tensors in a checkpoint. Data; no arithmetic.

`ModelQuant` is what a config.json says (families/quantization.py reads it): rules from module names to a `WeightQuant`.
`quant_tensors` lists the tensors of one such weight as checkpoints have them; weights.py makes ParamSpecs of them, so
that loading, dummy weights, shards and byte counts know them. Letters: O out · I in · G groups of inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from engine.errors import ConfigError

Scheme = Literal["fp8", "int8", "w4"]
Layout = Literal["plain", "awq", "gptq", "packed"]
Act = Literal["none", "token", "block", "static"]

FORMS = ("fp8", "fp8_block", "int8", "w4", "w4_fine")
BLOCK = 128  # rows and columns of a block with one scale
NIBBLES, BYTES = 8, 4  # weights of 4 and of 8 bits in an int32
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int8": 1, "float8_e4m3": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightQuant:
    """How one weight [O, I] is kept.

    scheme: fp8 is e4m3; w4 is 4 bits without a sign, less a zero, times a scale, of each group of inputs.
    layout: plain is [O, I] in the scheme's type; awq and gptq are [.., I, O] packed in int32, packed is [O, ..].
    per: what shares a scale. group: inputs of a "group"; 0 where a row is one group.
    act: how activations are rounded before the product (see cuda_kernels/quant_weight.py).
    zero_bias: what is added to a stored zero (gptq writes one less than it means).
    at_load: the checkpoint has the plain weight; it is rounded when it is loaded.
    """

    scheme: Scheme
    layout: Layout
    per: Literal["tensor", "channel", "block", "group"]
    act: Act
    group: int = 0
    symmetric: bool = True
    act_order: bool = False
    zero_bias: int = 0
    at_load: bool = False

    @property
    def form(self) -> str:
        """What a backend's products must know: one of FORMS. w4_fine: groups that are no whole blocks, or act order."""
        if self.scheme == "w4":
            return "w4_fine" if self.group % BLOCK or self.act_order else "w4"
        return "fp8_block" if self.per == "block" else self.scheme

    @property
    def text(self) -> str:
        """For reports: "fp8 per channel, activations per token"."""
        kind = {"fp8": "fp8", "int8": "int8", "w4": "4 bits"}[self.scheme]
        scales = f"per {self.per}" + (f" of {self.group}" if self.group else "")
        if self.per == "block":
            scales += f" of {BLOCK} x {BLOCK}"
        acts = {"none": "", "token": ", activations per token", "block": f", activations per {BLOCK} inputs"}
        extras = (", act order" if self.act_order else "") + (", rounded at load" if self.at_load else "")
        return f"{kind} {scales}{acts.get(self.act, ', activations with fixed scales')}{extras}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """Module names. kind: exact; path = whole parts of the dotted name, in a row; regex = of its beginning; linear =
    every one.
    """

    kind: Literal["linear", "exact", "path", "regex"]
    text: str = ""

    def matches(self, names: tuple[str, ...]) -> bool:
        """names: the spellings of one module."""
        if self.kind == "linear":
            return True
        if self.kind == "exact":
            return self.text in names
        if self.kind == "path":
            return any(f".{self.text}." in f".{name}." for name in names)
        return any(re.match(self.text, name) is not None for name in names)


Rules = tuple[tuple[tuple[Pattern, ...], WeightQuant], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelQuant:
    """method: as --quantization names it. rules: the first that matches a module names its form; ignored ones win."""

    method: str
    rules: Rules
    ignored: tuple[Pattern, ...] = ()

    def of(self, names: Iterable[str]) -> WeightQuant | None:
        """How the linear module with these spellings is kept, None = plain."""
        spellings = tuple(names)
        if any(pattern.matches(spellings) for pattern in self.ignored):
            return None
        for patterns, quant in self.rules:
            if any(pattern.matches(spellings) for pattern in patterns):
                return quant
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dim:
    """One dimension of a tensor: what it runs along, and how many rows or inputs of the weight an index covers.

    along: "out", "in", "whole" (all inputs, whatever a rank holds of them), "one" (a single entry).
    """

    along: Literal["out", "in", "whole", "one"]
    unit: int = 1

    def size(self, rows: int, columns: int) -> int:
        whole = {"out": rows, "in": columns, "whole": columns, "one": 1}[self.along]
        return -(-whole // self.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantTensor:
    """One tensor of a quantised weight, as checkpoints have it.

    field: which field of the kept weight it becomes: data, scale, zeros, order, act_scale.
    suffixes: spellings behind the module's name, the first that is present wins.
    flat: written without its dimensions of one entry too. dtype "float": any of the float types.
    init, value: of dummy weights, see ParamSpec. optional: may be absent, then it is what `init` says.
    """

    field: str
    suffixes: tuple[str, ...]
    dims: tuple[Dim, ...]
    dtype: str
    flat: bool = False
    init: str = "constant"
    value: float = 0.0
    optional: bool = False


SPREAD = {"fp8": 64.0, "int8": 40.0, "w4": 4.6}
"""Standard deviation of the stored numbers of dummy weights: normals of fp8 and int8, all of 0 .. 15 of w4."""
BYTE_SPREAD = 73.9  # of all of 0 .. 255

OUT, IN, ONE = Dim(along="out"), Dim(along="in"), Dim(along="one")
PACKED_OUT, PACKED_IN = Dim(along="out", unit=NIBBLES), Dim(along="in", unit=NIBBLES)


def quant_tensors(quant: WeightQuant, rows: int, columns: int, where: str) -> tuple[QuantTensor, ...]:
    """The tensors of a weight [rows, columns]. Raises ConfigError naming `where` if the sizes do not fit the form."""
    spread = columns**-0.5 / SPREAD[quant.scheme]  # dummies: weights of 1 / sqrt(I)
    if quant.scheme != "w4":
        if quant.layout == "packed" and columns % BYTES:
            raise ConfigError(f"{where}: {columns} inputs are not a multiple of {BYTES}, which an int32 holds")
        return plain_tensors(quant, spread)
    check_nibbles(quant, rows, columns, where)
    return nibble_tensors(quant, columns, spread)


def plain_tensors(quant: WeightQuant, spread: float) -> tuple[QuantTensor, ...]:
    """fp8 and int8: the weight in its own type, its scales, and perhaps the scale of its activations."""
    dims = {
        "tensor": (ONE,),
        "channel": (OUT, ONE),
        "block": (Dim(along="out", unit=BLOCK), Dim(along="in", unit=BLOCK)),
    }[quant.per]
    dtype = "float8_e4m3" if quant.scheme == "fp8" else "int8"
    data = QuantTensor(
        field="data", suffixes=("weight",), dims=(OUT, IN), dtype=dtype, init="codes", value=SPREAD[quant.scheme]
    )
    if quant.layout == "packed":
        bytes_in = Dim(along="in", unit=BYTES)
        data = QuantTensor(field="data", suffixes=("weight_packed",), dims=(OUT, bytes_in), dtype="int32", init="codes")
        spread *= SPREAD["int8"] / BYTE_SPREAD
    suffixes = ("weight_scale", "weight_scale_inv")
    scale = QuantTensor(field="scale", suffixes=suffixes, dims=dims, dtype="float", flat=True, value=spread)
    if quant.act != "static":
        return data, scale
    four_sigma = 4.0 / (448 if quant.scheme == "fp8" else 127)
    suffixes = ("input_scale", "activation_scale")
    fixed = QuantTensor(field="act_scale", suffixes=suffixes, dims=(ONE,), dtype="float", flat=True, value=four_sigma)
    return data, scale, fixed


def check_nibbles(quant: WeightQuant, rows: int, columns: int, where: str) -> None:
    group = quant.group or columns
    if columns % group or group % NIBBLES:
        raise ConfigError(f"{where}: {columns} inputs are not whole groups of {group}, a multiple of {NIBBLES}")
    if rows % NIBBLES and not (quant.layout == "packed" and quant.symmetric):
        raise ConfigError(f"{where}: {rows} outputs are not a multiple of {NIBBLES}, along which zeros are packed")


def nibble_tensors(quant: WeightQuant, columns: int, spread: float) -> tuple[QuantTensor, ...]:
    """w4: nibbles and zeros packed in int32, the scales of groups, with act order the group of each input."""
    group = quant.group or columns
    # A rank that holds some inputs needs their groups; with act order these may be any, and of one group there is one.
    groups = Dim(along="whole" if quant.act_order or group == columns else "in", unit=group)
    zero = (8 - quant.zero_bias) * 0x11111111
    middle = float(zero - (1 << 32) if zero >= 1 << 31 else zero)
    names = {
        "gptq": ("qweight", (PACKED_IN, OUT), "scales", (groups, OUT), "qzeros", (groups, PACKED_OUT), "g_idx"),
        "awq": ("qweight", (IN, PACKED_OUT), "scales", (groups, OUT), "qzeros", (groups, PACKED_OUT), ""),
        "packed": (
            "weight_packed",
            (OUT, PACKED_IN),
            "weight_scale",
            (OUT, groups),
            "weight_zero_point",
            (PACKED_OUT, groups),
            "weight_g_idx",
        ),
    }
    data, data_dims, scale, scale_dims, zeros, zeros_dims, order = names[quant.layout]
    tensors = [
        QuantTensor(field="data", suffixes=(data,), dims=data_dims, dtype="int32", init="codes"),
        QuantTensor(field="scale", suffixes=(scale,), dims=scale_dims, dtype="float", value=spread),
    ]
    if not (quant.layout == "packed" and quant.symmetric):
        tensors.append(QuantTensor(field="zeros", suffixes=(zeros,), dims=zeros_dims, dtype="int32", value=middle))
    if quant.act_order or quant.layout == "gptq":
        tensors.append(
            QuantTensor(
                field="order",
                suffixes=(order,),
                dims=(IN,),
                dtype="int32",
                init="groups",
                value=group,
                optional=not quant.act_order,
            )
        )
    return tuple(tensors)


def stored_sizes(quant: WeightQuant | None, rows: int, columns: int, item: int) -> list[int]:
    """Bytes of the tensors that a device keeps of a weight [rows, columns]. item: of a number of the activations."""
    if quant is None:
        return [rows * columns * item]
    if quant.scheme == "w4":
        groups = columns // (quant.group or columns)
        order = [4 * columns] if quant.act_order else []
        return [rows * columns // 2, rows * groups * item, rows * groups, *order]
    scales = -(-rows // BLOCK) * -(-columns // BLOCK) if quant.per == "block" else rows
    return [rows * columns, 4 * scales, *([4] if quant.act == "static" else [])]
