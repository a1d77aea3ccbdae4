"""Writes safetensors files byte by byte, right or wrong as asked, for the tests that damage checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.specs.checkpoint import INDEX_NAME, read_config, stream_params
from engine.specs.families import parse_config
from engine.specs.generation import generation_defaults, stop_ids
from engine.specs.weights import dummy_params, param_table

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GENERATION: dict[str, Any] = {"eos_token_id": [2, 3], "temperature": 0.6}
FILE = "model.safetensors"
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I32": "<i4", "U8": "u1"}


@dataclass
class Tensor:
    dtype: str
    shape: list[Any]
    data: bytes


@dataclass
class Draft:
    """A checkpoint about to be written. Tests change it before, or the files after."""

    folder: Path
    config: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(CONFIG)))
    generation: dict[str, Any] = field(default_factory=lambda: dict(GENERATION))
    tensors: dict[str, Tensor] = field(default_factory=dict)
    num_shards: int = 1

    def __post_init__(self) -> None:
        arch = parse_config(CONFIG)
        for param, tensor in dummy_params(arch, 0):
            name = param.sources[0].name
            self.tensors[name] = Tensor("F32", list(param.shape), tensor.data.tobytes())

    def shard_names(self) -> list[str]:
        if self.num_shards == 1:
            return [FILE]
        return [f"model-{i + 1:05d}-of-{self.num_shards:05d}.safetensors" for i in range(self.num_shards)]

    def write(self) -> Path:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        (self.folder / "generation_config.json").write_text(json.dumps(self.generation))
        names = list(self.tensors)
        cut = -(-len(names) // self.num_shards)
        weight_map = {}
        for i, shard in enumerate(self.shard_names()):
            part = {name: self.tensors[name] for name in names[i * cut : (i + 1) * cut]}
            (self.folder / shard).write_bytes(pack(part))
            weight_map |= dict.fromkeys(part, shard)
        if self.num_shards > 1:
            (self.folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return self.folder


def header_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + len(tensor.data)]}
        at += len(tensor.data)
    return header


def pack(tensors: dict[str, Tensor], header: dict[str, Any] | bytes | None = None) -> bytes:
    """The bytes of a safetensors file; `header` overrides the right one."""
    text = header if isinstance(header, bytes) else json.dumps(header or header_of(tensors)).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.data for tensor in tensors.values())


def array(values: np.ndarray[Any, Any], dtype: str = "F32") -> Tensor:
    return Tensor(dtype, list(values.shape), values.astype(NUMPY[dtype]).tobytes())


def load(folder: Path) -> int:
    """Everything that a start-up reads of a checkpoint. Returns the number of parameters."""
    arch = parse_config(read_config(folder))
    stop_ids(folder, arch)
    generation_defaults(folder)
    found = {param.name: tensor.data.shape for param, tensor in stream_params(folder, arch)}
    assert found == {param.name: param.shape for param in param_table(arch)}
    return len(found)
