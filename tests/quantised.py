"""Quantised tiny checkpoints, written by the field's own library: the fixtures of tests on weights in few bits.

`write_compressed` rounds a model of tests/checkpoints.py with compressed-tensors, which also packs and saves it, and
which transformers calls to read it again: nothing of twinfer's own formats is used here. Scales come from the largest
weights, those of activations from a run of the model. `write_packed` fills the layouts of AWQ and GPTQ with numbers
that the same library reads or packs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.checkpoints import make_model

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
"""Of every quantised checkpoint, over those of checkpoints.COMMON: several groups of 32, a block and a half."""


def write_compressed(
    folder: Path,
    weights: dict[str, Any],
    activations: dict[str, Any] | None = None,
    *,
    family: str = "llama",
    dtype: str = "float32",
    ignore: tuple[str, ...] = ("lm_head",),
    targets: tuple[str, ...] = ("Linear",),
    **overrides: Any,
) -> Path:
    """Save a checkpoint whose linear modules are kept as `weights` and `activations` (QuantizationArgs) say."""
    model = make_model(family, dtype=dtype, **{**SIZES, **overrides})
    largest = largest_inputs(model)
    scheme = QuantizationScheme(
        targets=list(targets),
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**activations) if activations else None,
    )
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore), quantization_status="frozen")
    apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            set_scales(module, largest[name])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    rounded = make_model(family, dtype=dtype, **{**SIZES, **overrides})
    rounded.load_state_dict({name: model.state_dict()[name] for name in rounded.state_dict()})
    rounded.save_pretrained(plain_twin(folder))
    return folder


def plain_twin(folder: Path) -> Path:
    """Where the checkpoint lies whose weights are what the library reads out of `folder`, not quantised."""
    return folder.with_name(folder.name + "-plain")


def largest_inputs(model: nn.Module) -> dict[str, Tensor]:
    """The largest input of each linear module in a run over random tokens, as a tensor of one number."""
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            largest[name] = args[0].abs().amax().reshape(1)

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    ids = torch.randint(3, 320, (2, 100), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        model(ids)
    for handle in handles:
        handle.remove()
    return largest


def set_scales(module: nn.Module, largest_input: Tensor) -> None:
    """Scales (and zeros) of one module by the library's own rule, from the extremes of what shares a scale."""
    scheme = module.quantization_scheme
    low, high = extremes(module.weight.detach(), scheme.weights)
    scale, zero = calculate_qparams(low, high, scheme.weights)
    with torch.no_grad():
        module.weight_scale.copy_(scale.reshape(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.copy_(zero.reshape(module.weight_zero_point.shape))
        acts = scheme.input_activations
        if acts is not None and not acts.dynamic:
            scale, _ = calculate_qparams(-largest_input, largest_input, acts)
            module.input_scale.copy_(scale.reshape(module.input_scale.shape))


def extremes(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """(least, largest) of each part of weight [O, I] that shares a scale."""
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))  # [O / r, r, I / c, c]
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(1, (-1, args.group_size if args.strategy == "group" else weight.shape[1]))  # [O, G, g]
    return groups.amin(2), groups.amax(2)


Written = tuple[dict[str, Tensor], Tensor]
"""Tensors of a module by suffix, and the weight [O, I] that they stand for."""


def awq_tensors(rows: int, columns: int, group: int, generator: torch.Generator) -> Written:
    """AutoAWQ's gemm layout filled with random bits, and what compressed-tensors' converter reads there."""
    groups = columns // group
    tensors = {
        "qweight": random_bits((columns, rows // 8), generator),
        "qzeros": random_bits((groups, rows // 8), generator),
        "scales": (torch.rand(groups, rows, generator=generator) * 0.02 + 0.01).half(),
    }
    converter = AutoAWQConverter(group_size=group)
    codes, scale, zeros = converter._convert_gemm_module(tensors["qweight"], tensors["scales"], tensors["qzeros"])
    spread = [part.float().repeat_interleave(group, 1) for part in (scale, zeros)]
    return tensors, (codes.float() - spread[1]) * spread[0]


def gptq_tensors(rows: int, columns: int, group: int, generator: torch.Generator, *, act_order: bool) -> Written:
    """AutoGPTQ's layout (format v1), packed by compressed-tensors' function, which takes numbers of -8 .. 7."""
    groups = columns // group
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    zeros = torch.randint(1, 16, (rows, groups), generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.01).half()
    index = torch.arange(columns) // group
    if act_order:
        index = index[torch.randperm(columns, generator=generator)]
    tensors = {
        "qweight": pack_to_int32((codes - 8).to(torch.int8).T.contiguous(), 4, packed_dim=0).contiguous(),
        "qzeros": pack_to_int32((zeros - 1 - 8).to(torch.int8).T.contiguous(), 4),
        "scales": scale.T.contiguous(),
        "g_idx": index.to(torch.int32),
    }
    return tensors, (codes - zeros[:, index]).float() * scale.float()[:, index]


def random_bits(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, dtype=torch.int64).to(torch.int32)


def write_packed(
    folder: Path, config: dict[str, Any], tensors_of: Callable[..., Written], *, family: str = "llama", **overrides: Any
) -> Path:
    """Save a checkpoint with quantization_config `config` and its plain twin; tensors_of as awq_tensors."""
    model = make_model(family, **{**SIZES, **overrides})
    generator = torch.Generator().manual_seed(7)
    stored = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            rows, columns = module.weight.shape
            tensors, weight = tensors_of(rows, columns, config["group_size"], generator)
            del stored[name + ".weight"]
            stored |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
            module.weight.data.copy_(weight)
    model.save_pretrained(plain_twin(folder))
    model.config.save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "quantization_config": config}))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    return folder
