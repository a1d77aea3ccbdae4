"""Weights in few bits: what the arrays of one are called, and how they are made of a checkpoint's tensors, in numpy.

A weight "qkv" that is kept as codes has its scales beside it, and their name says what its inputs are rounded to:
"qkv_int8", "qkv_e4m3", "qkv_blocks" (e4m3, a scale for 128), or "qkv_scale": not at all; "qkv_act_scale" is the fixed
scale of the inputs. Of 4 bits "qkv" is packed as the TPU's kernel takes it, "qkv_w4" the scales of groups of 128 and
"qkv_w4_zeros" their zeros. On a TPU codes stay int8, e4m3 and 4 bits, on a CPU int8. Others are kept
in the activations' type, which holds them exactly, and blocks and weights of 4 bits are turned back when they are
loaded. Called by weights.py.
Letters: O out · I in · G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, check
from engine.specs.arch import ArchSpec
from engine.specs.quant import BLOCK, NIBBLES, WeightQuant
from engine.specs.weights import ParamSpec, RawTensor, from_float32, param_table, to_float32
from pallas_kernels.dispatch import keeps_codes
from pallas_kernels.tpu_stacked import packed

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble that holds column 0, 1, .. 7 of eight
E4M3_MAX, SMALLEST = 448.0, 1e-12
ONES = 0x11111111
ROUNDED = {"int8": "int8", "fp8": "e4m3"}
CODES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
SUFFIXES = ("_int8", "_e4m3", "_blocks", "_scale", "_act_scale", "_w4", "_w4_zeros")

FUSED = {
    "qkv": ("q", "k", "v"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "gate_up": ("gate", "up"),
    "gate_up_bias": ("gate_bias", "up_bias"),
}
FUSED |= {
    stored + end: tuple(part + end for part in FUSED[stored]) for stored in ("qkv", "gate_up") for end in SUFFIXES
}
FUSED_INTO = {part: stored for stored, parts in FUSED.items() for part in parts}

Numbers = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Form:
    """How the arrays of a weight are kept. suffix: of its scales' name. fixed: inputs have a scale of their own.
    zeros: groups of 4 bits have one.
    """

    scheme: str
    suffix: str
    fixed: bool = False
    zeros: bool = False


def form_of(quant: WeightQuant | None, platform: str) -> Form | None:
    """None: as a plain weight."""
    if quant is None:
        return None
    if quant.scheme == "w4" or quant.per == "block":
        # mesh.describe says what it takes
        check(platform != "tpu" or quant.form == "w4", f"a TPU does not multiply {quant.text}")
        if platform == "tpu":
            return Form("w4", "_w4", zeros=not quant.symmetric)
        return Form("blocks", "_blocks") if quant.act == "block" else None
    suffix = "_scale" if quant.act == "none" else f"_{ROUNDED[quant.scheme]}"
    return Form(quant.scheme, suffix, quant.act == "static")


def kept_params(arch: ArchSpec, platform: str) -> Iterator[tuple[ParamSpec, np.dtype | None]]:
    """Every array that is kept of every parameter, in model order, and its dtype, None: that of the activations."""
    quants = {param.weight: param.quant for param in param_table(arch)}
    for plain in param_table(replace(arch, quant=None)):
        form = form_of(quants[plain.name], platform)
        if form is None:
            yield plain, None
            continue
        if form.scheme == "w4":
            yield from nibble_params(plain, form)
            continue
        rows = replace(plain, shape=plain.shape[:1], axes=plain.axes[:1], sources=(), dtype="float32")
        yield plain, CODES[form.scheme] if keeps_codes(platform, form.scheme) else None
        yield replace(rows, name=plain.name + form.suffix), np.dtype(np.float32)
        if form.fixed:
            name = plain.name + "_act_scale"
            yield replace(rows, name=name, shape=(1,), axes=("",), granule=1), np.dtype(np.float32)


def nibble_params(plain: ParamSpec, form: Form) -> Iterator[tuple[ParamSpec, np.dtype]]:
    """The arrays of a weight of 4 bits on a TPU. Raises ConfigError where it is no whole blocks."""
    rows, inputs = plain.shape
    if rows % BLOCK or inputs % BLOCK:
        raise ConfigError(
            f"quantization: {plain.name}: [{rows}, {inputs}] in 4 bits is no whole blocks of {BLOCK} x {BLOCK}, which "
            "a TPU takes; use --backend torch on a GPU"
        )
    words = replace(plain, shape=(rows // NIBBLES, inputs), spans=plain.shape, units=(NIBBLES, 1))
    yield words, np.dtype(np.int32)
    axes, shape = (*plain.axes, ""), (rows // BLOCK, inputs // BLOCK, BLOCK)
    spans, units = (rows, inputs, BLOCK), (BLOCK, BLOCK, 1)
    for suffix in (form.suffix, form.suffix + "_zeros")[: 1 + form.zeros]:
        name = plain.name + suffix
        table = replace(plain, name=name, shape=shape, axes=axes, spans=spans, units=units, sources=())
        yield table, np.dtype(np.float32)


def any_widened(arch: ArchSpec, platform: str) -> bool:
    """Whether a weight in few bits takes the memory of a plain one here."""
    quants = [param.quant for param in param_table(arch) if param.quant is not None]
    if platform == "tpu":
        return False
    return any(q.scheme == "w4" or q.per == "block" or not keeps_codes(platform, q.scheme) for q in quants)


def check_alike(arch: ArchSpec, platform: str) -> None:
    """Raises ConfigError where parts of one array are kept in different ways."""
    quants = {param.weight: param.quant for param in param_table(arch)}
    for plain in param_table(replace(arch, quant=None)):
        stem, _, part = plain.name.rpartition(".")
        if FUSED_INTO.get(part) in ("qkv", "gate_up"):
            first = f"{stem}.{FUSED[FUSED_INTO[part]][0]}"
            if form_of(quants[plain.name], platform) != form_of(quants[first], platform):
                raise ConfigError(
                    f"quantization: {first} and {plain.name} are kept in different ways, which the jax backend does "
                    "not take yet; use --backend torch"
                )


def check_equal(name: str, scales: NDArray[Any]) -> None:
    """Raises ConfigError where the parts of an array have fixed scales of inputs that differ."""
    if (scales != scales[0]).any():
        raise ConfigError(
            f"quantization: {name}: {scales.tolist()} differ, which the jax backend does not take yet; "
            "use --backend torch"
        )


class QuantLoad:
    """The weights of a model that are not plain, while their tensors come."""

    def __init__(self, arch: ArchSpec, dtype: str, platform: str) -> None:
        self._wide = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        self._platform = platform
        self._left: dict[str, int] = {}
        self._fields: dict[str, dict[str, RawTensor]] = {}
        for param in param_table(arch):
            self._left[param.weight] = self._left.get(param.weight, 0) + 1

    def take(self, param: ParamSpec, tensor: RawTensor) -> dict[str, Numbers]:
        """Take one tensor; -> the arrays by name when it was the last of its weight, else {}. For quantised ones."""
        fields = self._fields.setdefault(param.weight, {})
        fields[param.field] = tensor
        quant = param.quant
        if quant is None or len(fields) < self._left[param.weight]:
            return {}
        del self._fields[param.weight]
        form = form_of(quant, self._platform)
        if form is not None and form.scheme == "w4":
            return packed_nibbles(param.weight, form, quant, fields)
        if form is None or form.scheme == "blocks":
            turned = nibbles(quant, fields) if quant.scheme == "w4" else blocks(fields)
            ones = np.ones(len(turned), np.float32)
            arrays = {param.weight: turned.astype(self._wide)}
            return arrays if form is None else arrays | {param.weight + form.suffix: ones}
        codes, scale = round_to_e4m3(fields[""]) if quant.at_load else plain_codes(quant, fields)
        kept = codes if keeps_codes(self._platform, quant.scheme) else codes.astype(self._wide)
        arrays = {param.weight: kept, param.weight + form.suffix: scale}
        if form.fixed:
            arrays[param.weight + "_act_scale"] = to_float32(fields["act_scale"]).reshape(1)
        return arrays


def convert(tensor: RawTensor, dtype: str) -> NDArray[Any]:
    """The numbers in the activation dtype; bfloat16 rounds to nearest even."""
    if dtype == "bfloat16":
        bits = tensor.data if tensor.dtype == "bfloat16" else from_float32(to_float32(tensor), "bfloat16")
        return bits.view(ml_dtypes.bfloat16)
    check(dtype == "float32", f"activations of {dtype}")
    return to_float32(tensor)


def plain_codes(quant: WeightQuant, fields: dict[str, RawTensor]) -> tuple[Numbers, NDArray[np.float32]]:
    """(codes [O, I], scales f32 [O]) of fp8 and int8."""
    raw = fields["data"].data
    if fields["data"].dtype == "int32":  # four bytes, 128 added to each
        codes = (raw.view(np.uint8) ^ np.uint8(0x80)).view(np.int8)
    else:
        codes = raw.view(CODES[quant.scheme])
    scale = np.broadcast_to(to_float32(fields["scale"]).reshape(-1), (codes.shape[0],))
    return codes, np.ascontiguousarray(scale)


def round_to_e4m3(tensor: RawTensor) -> tuple[Numbers, NDArray[np.float32]]:
    """A plain weight [O, I] with a scale a row."""
    weight = to_float32(tensor)
    scale = np.maximum(np.abs(weight).max(axis=1), np.float32(SMALLEST)) / np.float32(E4M3_MAX)
    codes = np.clip(weight / scale[:, None], -E4M3_MAX, E4M3_MAX).astype(CODES["fp8"])
    return codes, scale


def blocks(fields: dict[str, RawTensor]) -> NDArray[np.float32]:
    """The numbers [O, I] that e4m3 weights with a scale for each 128 x 128 stand for."""
    codes = fields["data"].data.view(CODES["fp8"]).astype(np.float32)
    scale = to_float32(fields["scale"]).repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)
    return codes * scale[: codes.shape[0], : codes.shape[1]]


def packed_nibbles(name: str, form: Form, quant: WeightQuant, fields: dict[str, RawTensor]) -> dict[str, Numbers]:
    """A weight of 4 bits by name, as the TPU's kernel takes it: each group's scale and zero for every 128 inputs."""
    codes, scale, offsets = nibble_codes(quant, fields)
    times = codes.shape[1] // BLOCK // scale.shape[1]
    scale, offsets = scale.repeat(times, axis=1), offsets.repeat(times, axis=1)
    arrays = packed(codes, scale, offsets if form.zeros else None)
    return dict(zip((name, name + form.suffix, name + form.suffix + "_zeros"), arrays, strict=False))


def nibbles(quant: WeightQuant, fields: dict[str, RawTensor]) -> NDArray[np.float32]:
    """The numbers [O, I] that weights of 4 bits stand for."""
    codes, scale, offsets = nibble_codes(quant, fields)
    group = quant.group or codes.shape[1]
    of_input = fields["order"].data if "order" in fields else np.arange(codes.shape[1]) // group
    shifted = codes.astype(np.float32) - offsets.astype(np.float32)[:, of_input]
    return np.asarray(shifted * scale[:, of_input], np.float32)


def nibble_codes(
    quant: WeightQuant, fields: dict[str, RawTensor]
) -> tuple[NDArray[np.uint8], NDArray[np.float32], Numbers]:
    """(codes [O, I], scales [O, G], zeros [O, G]). Packings: AutoAWQ's, AutoGPTQ's, compressed-tensors'."""
    data, scale = fields["data"].data, to_float32(fields["scale"])
    zeros = fields["zeros"].data if "zeros" in fields else None
    if zeros is not None:
        # as a whole: a zero of 0 has borrowed from its neighbours when it was stored less one
        zeros = (zeros.view(np.uint32) + np.uint32(quant.zero_bias * ONES)).view(np.int32)
    if quant.layout == "awq":  # data [I, O / 8], zeros [G, O / 8], scale [G, O]
        codes, scale = unpack(data, AWQ_PLACES).T, scale.T
    elif quant.layout == "gptq":  # data [I / 8, O], zeros [G, O / 8], scale [G, O]
        codes, scale = unpack(data.T), scale.T
    else:  # data [O, I / 8], zeros [O / 8, G], scale [O, G]
        codes = unpack(data)
    offsets: Numbers = np.full(scale.shape, 8, np.uint8)
    if zeros is not None and quant.layout == "packed":
        offsets = unpack(zeros.T).T[: scale.shape[0]]
    elif zeros is not None:
        offsets = unpack(zeros, AWQ_PLACES if quant.layout == "awq" else tuple(range(8))).T
    return codes, scale, offsets


def unpack(packed: Numbers, places: tuple[int, ...] = tuple(range(8))) -> NDArray[np.uint8]:
    """u8 [R, 8 C] of i32 [R, C]: eight numbers of 0 .. 15 an entry. places: the nibble of each of the eight."""
    shifts = 4 * np.array(places, np.uint32)
    parts = (packed.view(np.uint32) if packed.flags.c_contiguous else packed.copy().view(np.uint32))[
        ..., None
    ] >> shifts
    return (parts & 0xF).astype(np.uint8).reshape(packed.shape[0], -1)
