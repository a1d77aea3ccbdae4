"""How this backend stores parameters: the Storage table, logical -> stored, and the loader that goes through it.

q, k and v are rows of one tensor, gate and up of another: fewer and larger products. Everything else is stored as it is
named, [out, in], in the activation dtype, but norm weights in float32, as they are used, and on a CPU the weights of
products as its library packs them. Weights in few bits are quant_weights.py's. Called by the runner's load.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from backends.torch.quant_weights import QuantLoad
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
KV_DTYPES = DTYPES | {"fp8_e4m3": torch.float8_e4m3fn}
BITS = {"bfloat16": ("int16", torch.bfloat16), "float8_e4m3": ("int8", torch.float8_e4m3fn)}
"""Types that numpy has not: what their bits come as, and what they are."""


def stored_name(weight: str) -> str:
    """Where a parameter is stored: "layers.3.q" -> "layers.3.qkv"."""
    stem, _, part = weight.rpartition(".")
    return f"{stem}.{FUSED_INTO.get(part, part)}" if stem else part


def storage(arch: ArchSpec) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Name of a plain parameter -> (stored name, first row, shape of the stored tensor)."""
    heights: dict[str, int] = {}
    places: list[tuple[ParamSpec, str, int]] = []
    for param in param_table(arch):
        if not param.field:
            name = stored_name(param.name)
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
    table = param_table(arch)
    target, device = device, filled_on(device)
    quant = QuantLoad(arch, {param.weight: stored_name(param.weight) for param in table}, DTYPES[dtype])
    flat: dict[str, Any] = {}
    to_come = {param.name for param in table}
    for param, raw in stream:
        numbers = as_tensor(raw)
        to_come.discard(param.name)
        if quant.takes(param):
            whole = torch.empty(param.shape, dtype=numbers.dtype, device=device)
            fill(whole, numbers)
            done = quant.add(param, whole)
            if done is not None:
                flat[done[0]] = done[1]
            continue
        name, start, shape = places[param.name]
        if name not in flat:
            stored = torch.float32 if name.endswith("norm") else DTYPES[dtype]
            flat[name] = torch.empty(shape, dtype=stored, device=device)
        fill(flat[name][start : start + param.shape[0]], numbers)
    check(not to_come, f"parameters are incomplete: {sorted(to_come)}")
    return tree(arch, settled(flat, target))


def filled_on(device: torch.device) -> torch.device:
    """Where parameters are put together: on the host for torch-xla, where each copy would be a program."""
    return torch.device("cpu") if device.type == "xla" else device


def settled(flat: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The parameters where they stay, and as products like them best."""
    if device.type == "xla":
        return {name: value.to(device) for name, value in flat.items()}
    for name, value in flat.items():
        # rows of the embedding table are read one by one; what is in few bits is settled already
        if isinstance(value, Tensor) and value.dim() == 2 and name != "embed" and not value.is_mkldnn:
            flat[name] = pack(value)
    return flat


def fill(target: Tensor, numbers: Tensor) -> None:
    """Copy numbers into target, over and over where they are fewer (dummy weights). Both contiguous."""
    whole, rest = divmod(target.numel(), numbers.numel())
    flat, block = target.view(-1), numbers.reshape(-1).to(target.device)
    flat[: whole * len(block)].view(whole, len(block)).copy_(block)
    flat[whole * len(block) :].copy_(block[:rest])


def as_tensor(raw: RawTensor) -> Tensor:
    """The numbers as a CPU tensor of their own dtype; bfloat16 and e4m3 travel as bits."""
    if raw.dtype in BITS:
        bits, dtype = BITS[raw.dtype]
        return torch.from_numpy(raw.data.view(bits).copy()).view(dtype)
    return torch.from_numpy(raw.data.copy())


def tree(arch: ArchSpec, flat: dict[str, Any]) -> dict[str, Any]:
    """{"layers.3.qkv": x} -> {"layers": [.., {"qkv": x}]}."""
    layers: list[dict[str, Any]] = [{} for _ in arch.layers]
    params: dict[str, Any] = {"layers": layers}
    for name, value in flat.items():
        if name.startswith("layers."):
            _, index, part = name.split(".")
            layers[int(index)][part] = value
        else:
            params[name] = value
    return params
