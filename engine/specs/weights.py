"""The ParamSpec table: every parameter of an architecture once, as data.

Loading, dummy weights, shards, byte counts and `twinfer inspect` all go through `param_table(arch)`. Parameters are
logical (q, k and v apart, [out, in] as checkpoints have them); a backend's Storage table says how it keeps them (fused,
stacked, transposed, padded). Owned by specs; needs the standard library and numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.specs.arch import ArchSpec, Attention, LayerSpec

# Logical axes. "heads", "kv_heads" are N * H and K * H wide; "embed" D; "ffn" F; "vocab" V; "head" H.

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a parameter lies in a checkpoint: a whole tensor, or rows [start, stop) of its first axis.

    rows: height of the whole tensor when only a part of it is meant.
    """

    name: str
    start: int | None = None
    stop: int | None = None
    rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """One logical parameter.

    name: "embed", "final_norm", "head", or "layers.{i}.{part}" with part one of
        attn_norm, q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, post_attn_norm,
        ffn_norm, gate, up, down, gate_bias, up_bias, down_bias, post_ffn_norm.
    shape: weights are [out, in], as in checkpoints.
    axes: logical axis of each dimension.
    sources: checkpoint spellings, the first that is present wins (e.g. with or without a "model." prefix).
    granule: axes "heads" and "kv_heads" split only at multiples of this (the head size).
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    sources: tuple[Source, ...]
    init: str = "normal"  # dummy weights: "normal" | "ones" | "zeros"
    granule: int = 1

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class RawTensor:
    """Numbers as a checkpoint has them. dtype bfloat16 comes as its bits in uint16; the backend converts."""

    dtype: str  # "float32" | "bfloat16" | "float16"
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
        table.append(ParamSpec(name="head", shape=(vocab, width), axes=("vocab", "embed"), sources=heads))
    return tuple(table)


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
        params.append(
            ParamSpec(name=name + part, shape=(rows, width), axes=(axis, "embed"), sources=sources, granule=size)
        )
        if mixer.qkv_bias:
            bias = in_model(arch, f"{stem}{part}_proj.bias")
            params.append(ParamSpec(name=f"{name}{part}_bias", shape=(rows,), axes=(axis,), sources=bias, granule=size))
    out = in_model(arch, stem + "o_proj.weight")
    params.append(ParamSpec(name=name + "o", shape=(width, q_size), axes=("embed", "heads"), sources=out, granule=size))
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
        params.append(ParamSpec(name=name + part, shape=shape, axes=axes, sources=sources))
        if layer.ffn.bias:
            bias = in_model(arch, f"{stem}{part}_proj.bias")
            params.append(ParamSpec(name=f"{name}{part}_bias", shape=(rows,), axes=axes[:1], sources=bias))
    return params


def num_parameters(arch: ArchSpec) -> int:
    return sum(param.num_elements for param in param_table(arch))


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
