"""How this backend stores parameters: the Storage table, logical -> stored, and the loader that goes through it.

q, k and v are rows of one tensor, gate and up of another: fewer and larger products. Everything else is stored as it is
named, [out, in], in the activation dtype, but norm weights in float32, as they are used, and on a CPU the weights of
products as its library packs them. Called by the runner's load.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cuda_kernels.dispatch import pack
from engine.errors import check
from engine.specs.arch import ArchSpec
from engine.specs.weights import ParamSpec, RawTensor, param_table

FUSED = {
    "qkv": ("q", "k", "v"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "gate_up": ("gate", "up"),
    "gate_up_bias": ("gate_bias", "up_bias"),
}
FUSED_INTO = {part: stored for stored, parts in FUSED.items() for part in parts}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def storage(arch: ArchSpec) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Parameter name -> (stored name, first row, shape of the stored tensor)."""
    heights: dict[str, int] = {}
    places: list[tuple[ParamSpec, str, int]] = []
    for param in param_table(arch):
        stem, _, part = param.name.rpartition(".")
        name = f"{stem}.{FUSED_INTO.get(part, part)}" if stem else part
        places.append((param, name, heights.get(name, 0)))
        heights[name] = heights.get(name, 0) + param.shape[0]
    return {param.name: (name, start, (heights[name], *param.shape[1:])) for param, name, start in places}


def load_params(
    arch: ArchSpec, stream: Iterator[tuple[ParamSpec, RawTensor]], dtype: str, device: torch.device
) -> dict[str, Any]:
    """The parameters on the device, in the tree that torch_models.decoder.Params describes.

    stream: each parameter's numbers, or fewer that fill it over and over.
    """
    places = storage(arch)
    flat: dict[str, Tensor] = {}
    rows_left = {name: shape[0] for name, _, shape in places.values()}
    for param, raw in stream:
        name, start, shape = places[param.name]
        if name not in flat:
            stored = torch.float32 if name.endswith("norm") else DTYPES[dtype]
            flat[name] = torch.empty(shape, dtype=stored, device=device)
        fill(flat[name][start : start + param.shape[0]], as_tensor(raw))
        rows_left[name] -= param.shape[0]
    missing = sorted(name for name, left in rows_left.items() if left)
    check(not missing, f"parameters are incomplete: {missing}")
    for name, value in flat.items():
        if value.dim() == 2 and name != "embed":  # rows of the embedding table are read one by one
            flat[name] = pack(value)
    return tree(arch, flat)


def fill(target: Tensor, numbers: Tensor) -> None:
    """Copy numbers into target, over and over where they are fewer (dummy weights). Both contiguous."""
    whole, rest = divmod(target.numel(), numbers.numel())
    flat, block = target.view(-1), numbers.reshape(-1).to(target.device)
    flat[: whole * len(block)].view(whole, len(block)).copy_(block)
    flat[whole * len(block) :].copy_(block[:rest])


def as_tensor(raw: RawTensor) -> Tensor:
    """The numbers as a CPU tensor of their own dtype; bfloat16 travels as uint16 bits."""
    if raw.dtype == "bfloat16":
        return torch.from_numpy(raw.data.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(raw.data.copy())


def tree(arch: ArchSpec, flat: dict[str, Tensor]) -> dict[str, Any]:
    """{"layers.3.qkv": x} -> {"layers": [.., {"qkv": x}]}."""
    layers: list[dict[str, Tensor]] = [{} for _ in arch.layers]
    params: dict[str, Any] = {"layers": layers}
    for name, value in flat.items():
        if name.startswith("layers."):
            _, index, part = name.split(".")
            layers[int(index)][part] = value
        else:
            params[name] = value
    return params
