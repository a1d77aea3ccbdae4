"""The ParamSpec table: every parameter of an architecture once, as data.

Loading, dummy weights, shards, byte counts and `twinfer inspect` all go through `param_table(arch)`. Parameters are
logical (q, k and v apart, [out, in] as checkpoints have them); a backend's Storage table says how it keeps them (fused,
stacked, transposed, padded). Owned by specs; needs the standard library and numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError
from engine.specs.arch import ArchSpec, Attention, LayerSpec
from engine.specs.quant import ITEM_BYTES, QuantTensor, WeightQuant, quant_tensors

# Logical axes. "heads", "kv_heads" are N * H and K * H wide; "embed" D; "ffn" F; "vocab" V; "head" H.

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a parameter lies in a checkpoint: a whole tensor, or a part [start, stop) of one of its axes.

    rows: length of that axis of the whole tensor when only a part of it is meant.
    shared: other parameters have the same tensor (one scale of a fused weight).
    """

    name: str
    start: int | None = None
    stop: int | None = None
    rows: int | None = None
    axis: int = 0
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """One logical parameter.

    name: "embed", "final_norm", "head", or "layers.{i}.{part}" with part one of
        attn_norm, q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, post_attn_norm,
        ffn_norm, gate, up, down, gate_bias, up_bias, down_bias, post_ffn_norm.
        A weight in few bits is several parameters, "{its name}.{field}", see quant.py.
    shape: weights are [out, in], as in checkpoints.
    axes: logical axis of each dimension.
    sources: checkpoint spellings, the first that is present wins (e.g. with or without a "model." prefix).
    granule: axes "heads" and "kv_heads" split only at multiples of this (the head size).
    init: dummy weights: "normal" | "ones" | "zeros", and of quantised weights "constant" (value) | "codes" (stored
        numbers) | "groups" (the group of each input, value inputs each).
    quant, field: how the weight is kept that this belongs to, and what of it this is; "" = a plain weight.
    dtype: None = the checkpoint's, "float" = any of the float types, else exactly this.
    units: what an index of each axis covers (8 of packed numbers, a group), () = 1 everywhere. spans: length of each
        axis in what it covers, () = the shape; the last unit may reach over it.
    flat: axes of one entry may be left out. optional: may be absent, then it is what `init` says.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    sources: tuple[Source, ...]
    init: str = "normal"
    granule: int = 1
    quant: WeightQuant | None = None
    field: str = ""
    dtype: str | None = None
    units: tuple[int, ...] = ()
    spans: tuple[int, ...] = ()
    value: float = 0.0
    flat: bool = False
    optional: bool = False

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def weight(self) -> str:
        """Name of the weight that this is, or is a field of."""
        return self.name.removesuffix("." + self.field) if self.field else self.name

    def dtype_of(self, arch: ArchSpec) -> str:
        return arch.checkpoint_dtype if self.dtype in (None, "float") else str(self.dtype)

    def num_bytes(self, arch: ArchSpec) -> int:
        """In a checkpoint; scales are counted in the checkpoint's own float type."""
        return self.num_elements * ITEM_BYTES[self.dtype_of(arch)]


@dataclass(frozen=True, slots=True)
class RawTensor:
    """Numbers as a checkpoint has them. bfloat16 comes as its bits in uint16, e4m3 in uint8; the backend converts."""

    dtype: str  # "float32" | "bfloat16" | "float16" | "float8_e4m3" | "int32" | "int8"
    data: NDArray[Any]  # of the parameter's shape, C order


def param_table(arch: ArchSpec) -> tuple[ParamSpec, ...]:
    """Every parameter of `arch`, in model order. A tied head has no entry of its own."""
    width, vocab = arch.hidden_size, arch.vocab_size
    norm_init = "zeros" if arch.final_norm.offset else "ones"
    embed_sources = in_model(arch, "embed_tokens.weight")
    heads = tuple(Source(name=name) for name in arch.names.heads)
    if arch.tied_embeddings:
        embed_sources += heads  # a tied checkpoint may have kept only the head
    table = [ParamSpec(name="embed", shape=(vocab, width), axes=("vocab", "embed"), sources=embed_sources)]
    for index, layer in enumerate(arch.layers):
        table += layer_params(arch, index, layer)
    table.append(
        ParamSpec(
            name="final_norm", shape=(width,), axes=("embed",), sources=in_model(arch, "norm.weight"), init=norm_init
        )
    )
    if not arch.tied_embeddings:
        table += kept(arch, ParamSpec(name="head", shape=(vocab, width), axes=("vocab", "embed"), sources=heads))
    return tuple(table)


def kept(arch: ArchSpec, plain: ParamSpec) -> list[ParamSpec]:
    """The parameters of a linear module's weight: itself, or the tensors that it is kept in."""
    modules = tuple(source.name.removesuffix(".weight") for source in plain.sources)
    quant = arch.quant.of(modules) if arch.quant is not None else None
    if quant is None:
        return [plain]
    if quant.at_load:
        return [replace(plain, quant=quant)]
    rows, columns = plain.shape
    tensors = quant_tensors(quant, rows, columns, f"config.json: quantization_config: {modules[0]}")
    return [quant_param(plain, quant, tensor) for tensor in tensors]


def quant_param(plain: ParamSpec, quant: WeightQuant, tensor: QuantTensor) -> ParamSpec:
    """One tensor of a quantised weight, from the weight as it would be."""
    axes = {"out": plain.axes[0], "in": plain.axes[1]}
    return ParamSpec(
        name=f"{plain.name}.{tensor.field}",
        shape=tuple(dim.size(*plain.shape) for dim in tensor.dims),
        axes=tuple(axes.get(dim.along, "") for dim in tensor.dims),
        sources=tuple(quant_source(source, tensor, suffix) for source in plain.sources for suffix in tensor.suffixes),
        init=tensor.init,
        granule=plain.granule,
        quant=quant,
        field=tensor.field,
        dtype=tensor.dtype,
        units=tuple(dim.unit for dim in tensor.dims),
        spans=tuple(replace(dim, unit=1).size(*plain.shape) for dim in tensor.dims),
        value=tensor.value,
        flat=tensor.flat,
        optional=tensor.optional,
    )


def quant_source(source: Source, tensor: QuantTensor, suffix: str) -> Source:
    """Where a tensor of a weight lies, from where the plain weight would lie. Raises ConfigError at uneven cuts."""
    name = source.name.removesuffix("weight") + suffix
    if source.start is None or source.stop is None or source.rows is None:
        return Source(name=name)
    axis = next((index for index, dim in enumerate(tensor.dims) if dim.along == "out"), None)
    if axis is None:
        return Source(name=name, shared=True)
    unit = tensor.dims[axis].unit
    if source.start % unit or (source.stop % unit and source.stop != source.rows):
        raise ConfigError(
            f"config.json: quantization_config: {name}: parts of a fused weight do not begin at a multiple of {unit}"
        )
    stop, rows = -(-source.stop // unit), -(-source.rows // unit)
    return Source(name=name, start=source.start // unit, stop=stop, rows=rows, axis=axis)


def in_model(
    arch: ArchSpec, name: str, start: int | None = None, stop: int | None = None, rows: int | None = None
) -> tuple[Source, ...]:
    """One Source per prefix that the family's checkpoints may use."""
    return tuple(Source(name=prefix + name, start=start, stop=stop, rows=rows) for prefix in arch.names.prefixes)


def layer_params(arch: ArchSpec, index: int, layer: LayerSpec) -> list[ParamSpec]:
    """Parameters of one layer, in the order in which a token meets them."""
    width = arch.hidden_size
    mixer, norms = layer.mixer, layer.norms
    norm_init = "zeros" if norms.offset else "ones"

    def norm(part: str, tensor: str, size: int = width, axis: str = "embed") -> ParamSpec:
        sources = in_model(arch, f"layers.{index}.{tensor}.weight")
        return ParamSpec(name=f"layers.{index}.{part}", shape=(size,), axes=(axis,), sources=sources, init=norm_init)

    params = [norm("attn_norm", "input_layernorm"), *attention_params(arch, index, mixer)]
    if mixer.qk_norm:
        params += [
            norm("q_norm", "self_attn.q_norm", mixer.head_size, "head"),
            norm("k_norm", "self_attn.k_norm", mixer.head_size, "head"),
        ]
    if norms.sandwich:
        params += [norm("post_attn_norm", "post_attention_layernorm"), norm("ffn_norm", "pre_feedforward_layernorm")]
    else:
        params.append(norm("ffn_norm", "post_attention_layernorm"))
    params += ffn_params(arch, index, layer)
    if norms.sandwich:
        params.append(norm("post_ffn_norm", "post_feedforward_layernorm"))
    return params


def attention_params(arch: ArchSpec, index: int, mixer: Attention) -> list[ParamSpec]:
    """q, k, v, o and their biases; q, k and v may be rows of one fused tensor."""
    width, size = arch.hidden_size, mixer.head_size
    q_size, kv_size = mixer.num_heads * size, mixer.num_kv_heads * size
    stem, name = f"layers.{index}.self_attn.", f"layers.{index}."
    params: list[ParamSpec] = []
    row = 0
    for part, axis, rows in (("q", "heads", q_size), ("k", "kv_heads", kv_size), ("v", "kv_heads", kv_size)):
        if arch.names.fused:
            sources = in_model(arch, stem + "qkv_proj.weight", row, row + rows, q_size + 2 * kv_size)
        else:
            sources = in_model(arch, f"{stem}{part}_proj.weight")
        row += rows
        params += kept(
            arch, ParamSpec(name=name + part, shape=(rows, width), axes=(axis, "embed"), sources=sources, granule=size)
        )
        if mixer.qkv_bias:
            bias = in_model(arch, f"{stem}{part}_proj.bias")
            params.append(ParamSpec(name=f"{name}{part}_bias", shape=(rows,), axes=(axis,), sources=bias, granule=size))
    out = in_model(arch, stem + "o_proj.weight")
    params += kept(
        arch, ParamSpec(name=name + "o", shape=(width, q_size), axes=("embed", "heads"), sources=out, granule=size)
    )
    if mixer.out_bias:
        bias = in_model(arch, stem + "o_proj.bias")
        params.append(ParamSpec(name=name + "o_bias", shape=(width,), axes=("embed",), sources=bias))
    return params


def ffn_params(arch: ArchSpec, index: int, layer: LayerSpec) -> list[ParamSpec]:
    """gate, up, down and their biases; gate and up may be rows of one fused tensor."""
    width, size = arch.hidden_size, layer.ffn.size
    stem, name = f"layers.{index}.mlp.", f"layers.{index}."
    params: list[ParamSpec] = []
    for nth, (part, rows, axes) in enumerate(
        (("gate", size, ("ffn", "embed")), ("up", size, ("ffn", "embed")), ("down", width, ("embed", "ffn")))
    ):
        if arch.names.fused and part != "down":
            sources = in_model(arch, stem + "gate_up_proj.weight", nth * size, (nth + 1) * size, 2 * size)
        else:
            sources = in_model(arch, f"{stem}{part}_proj.weight")
        shape = (rows, width if part != "down" else size)
        params += kept(arch, ParamSpec(name=name + part, shape=shape, axes=axes, sources=sources))
        if layer.ffn.bias:
            bias = in_model(arch, f"{stem}{part}_proj.bias")
            params.append(ParamSpec(name=f"{name}{part}_bias", shape=(rows,), axes=axes[:1], sources=bias))
    return params


def num_parameters(arch: ArchSpec) -> int:
    """Of the model, in however many bits they are kept."""
    return sum(param.num_elements for param in param_table(replace(arch, quant=None)))


DUMMY_BLOCK = 1_048_573  # prime, so that a repeated block never lines up with the rows of a matrix


def dummy_params(arch: ArchSpec, seed: int) -> Iterator[tuple[ParamSpec, RawTensor]]:
    """Random weights of arch.checkpoint_dtype, the same for one seed everywhere: dummy_blocks, repeated."""
    for param, block in dummy_blocks(arch, seed):
        yield param, RawTensor(block.dtype, repeated(block.data, param.shape))


def dummy_blocks(arch: ArchSpec, seed: int) -> Iterator[tuple[ParamSpec, RawTensor]]:
    """Of each parameter the numbers [n] that fill it over and over, n <= DUMMY_BLOCK; a device can repeat them itself.

    Matrices have a standard deviation of 1 / sqrt(their last dimension), so that activations keep their size. Large
    matrices share one block of normals, each begun at another place.
    """
    dtype = arch.checkpoint_dtype
    shared: dict[float, NDArray[Any]] = {}
    for index, param in enumerate(param_table(arch)):
        count = min(param.num_elements, DUMMY_BLOCK)
        if param.field:
            yield param, quant_block(arch, param, seed, index)
            continue
        if param.init != "normal":
            yield param, RawTensor(dtype, from_float32(np.full(count, param.init == "ones", np.float32), dtype))
            continue
        # Biases are small, so that they matter and do not drown what they are added to.
        scale = param.shape[-1] ** -0.5 if len(param.shape) > 1 else 0.1
        if count < DUMMY_BLOCK:
            yield param, RawTensor(dtype, from_float32(normals(seed, index, count) * np.float32(scale), dtype))
            continue
        if scale not in shared:
            shared[scale] = from_float32(normals(seed, -1, count) * np.float32(scale), dtype)
        yield param, RawTensor(dtype, np.roll(shared[scale], index * 7919))


def quant_block(arch: ArchSpec, param: ParamSpec, seed: int, index: int) -> RawTensor:
    """Numbers [n] that fill one tensor of a quantised weight over and over. index: of the parameter."""
    count, dtype = min(param.num_elements, DUMMY_BLOCK), param.dtype_of(arch)
    if param.init == "groups":
        return input_groups(param)
    if param.init == "constant":
        if dtype == "int32":
            return RawTensor(dtype, np.full(count, int(param.value), np.int32))
        return RawTensor(dtype, from_float32(np.full(count, param.value, np.float32), dtype))
    if dtype == "int32":
        key = np.array([seed % 2**64, index], np.uint64)
        bits = np.random.Generator(np.random.Philox(key=key)).integers(0, 1 << 32, count, np.uint32)
        return RawTensor(dtype, bits.view(np.int32))
    values = normals(seed, index, count) * np.float32(param.value)
    if dtype == "int8":
        return RawTensor(dtype, np.clip(np.rint(values), -127, 127).astype(np.int8))
    return RawTensor(dtype, to_e4m3(values))


def input_groups(param: ParamSpec) -> RawTensor:
    """i32 [I]: the group of each input, one after another, with act order in turn."""
    inputs, size = np.arange(param.shape[0], dtype=np.int32), int(param.value)
    turns = param.quant is not None and param.quant.act_order
    return RawTensor("int32", inputs % (len(inputs) // size) if turns else inputs // size)


def to_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest e4m3 numbers, as bits: sign, 4 bits of exponent less 7, 3 of mantissa; none above 448."""
    codes = np.arange(127, dtype=np.int32)  # 127 is NaN
    exponent, mantissa = codes >> 3, (codes & 7) / 8
    known = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    nearest = np.searchsorted((known[1:] + known[:-1]) / 2, np.abs(values)).astype(np.uint8)
    return np.where(np.signbit(values), nearest | np.uint8(0x80), nearest).astype(np.uint8)


def normals(seed: int, stream: int, count: int) -> NDArray[np.float32]:
    key = np.array([seed % 2**64, stream % 2**64], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    return rng.standard_normal(count, dtype=np.float32)


def repeated(block: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of `shape` filled with copies of block [n], the last one cut."""
    data = np.empty(math.prod(shape), block.dtype)
    for start in range(0, data.size, block.size):
        data[start : start + block.size] = block[: data.size - start]
    return data.reshape(shape)


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """values (any shape) as RawTensor data of `dtype`, rounded to nearest even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return values.astype(np.float16 if dtype == "float16" else np.float32)


def to_float32(tensor: RawTensor) -> NDArray[np.float32]:
    """The numbers of `tensor`, exactly, as float32 of the same shape."""
    if tensor.dtype == "bfloat16":
        return (tensor.data.astype(np.uint32) << 16).view(np.float32)
    return tensor.data.astype(np.float32)
