"""Quantised layers in the fused decoder: the runner that a GPU has, in triton's interpreter, against the plain one.

Products are dispatch.linear's own; norms, gates, residuals and attention around them are the kernels. What is kept in
memory is what the memory plan says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.interpreter import DEVICE  # before triton

pytest.importorskip("triton")

from backends.torch import memory
from backends.torch.runner import Runner
from backends.torch.weights import load_params
from cuda_kernels.quant_reference import dequantised
from cuda_kernels.quant_weight import Parts, QuantWeight
from engine.specs.arch import ArchSpec
from engine.specs.families.fields import Fields
from engine.specs.families.quantization import at_load, parse_quantization
from engine.specs.quant import ModelQuant
from engine.specs.weights import dummy_blocks
from tests.backends.driver import Driver, llama

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
SOME = {**AWQ, "modules_to_not_convert": ["k_proj", "down_proj"]}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
INT8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        }
    },
}
FORMS = {"gptq": GPTQ, "awq": AWQ, "some": SOME, "blocks": BLOCKS, "static": STATIC, "int8": INT8, "fp8": None}


def kept(name: str) -> ArchSpec:
    """int8 keeps the head so too, which is its own."""
    config = FORMS[name]
    quant: ModelQuant | None = at_load("fp8")
    if config is not None:
        quant = parse_quantization(Fields({"quantization_config": config}))
    return replace(llama(), tied_embeddings=False, quant=quant)


def plain_params(arch: ArchSpec) -> dict[str, Any]:
    """The dummies of a quantised model as f32 weights."""
    params = load_params(arch, dummy_blocks(arch, 0), "float32", DEVICE)
    for parts in (*params["layers"], params):
        for name, value in parts.items():
            if isinstance(value, QuantWeight | Parts):
                parts[name] = whole(value)
    return params


def whole(weight: QuantWeight | Parts | torch.Tensor) -> torch.Tensor:
    if isinstance(weight, Parts):
        return torch.cat([whole(part) for part in weight.parts])
    return dequantised(weight, torch.float32) if isinstance(weight, QuantWeight) else weight


@pytest.mark.parametrize("name", ["gptq", "awq", "some"])
def test_weights_alone_are_exact(name: str) -> None:
    """The same tokens and log-probabilities as a plain model with the weights that are meant."""
    arch = kept(name)
    driver = Driver(Runner(), arch, device=DEVICE.type)
    assert type(driver.runner._work).__name__ == "GpuSteps"
    twin = Driver(Runner(), replace(arch, quant=None), device=DEVICE.type)
    set_params(twin, plain_params(arch))
    answers = [answer(each) for each in (driver, twin)]
    assert answers[0][0] == answers[1][0]
    np.testing.assert_allclose(answers[0][1], answers[1][1], atol=2e-4)


def set_params(driver: Driver, params: dict[str, Any]) -> None:
    """Other weights under the same programs."""
    decoder = driver.runner._decoder
    decoder.embed.copy_(params["embed"])
    decoder.head.copy_(params["head"])
    decoder.final_norm.copy_(params["final_norm"])
    for layer, parts in zip(decoder.layers, params["layers"], strict=True):
        for room in (layer, layer.mixer, layer.ffn):
            for name in parts:
                if isinstance(getattr(room, name, None), torch.Tensor):
                    getattr(room, name).copy_(parts[name])


def answer(driver: Driver) -> tuple[list[int], list[float]]:
    """Two sequences side by side: a prompt in two chunks, then decode steps."""
    with torch.inference_mode():
        seqs = [driver.new([5 + i, *range(20, 20 + length)], num_logprobs=0) for i, length in enumerate((9, 21))]
        driver.generate(seqs, 5, chunk=12)
    return [token for seq in seqs for token in seq.outputs], [x for seq in seqs for x in seq.logprobs]


@pytest.mark.parametrize("name", ["blocks", "static", "int8", "fp8"])
def test_rounded_activations_stay_near(name: str) -> None:
    """Log-probabilities of one prompt's first token: within what the rounding of activations makes, and not equal."""
    arch = kept(name)
    driver = Driver(Runner(), arch, device=DEVICE.type)
    twin = Driver(Runner(), replace(arch, quant=None), device=DEVICE.type)
    set_params(twin, plain_params(arch))
    rounded, exact = (answer(each)[1][0] for each in (driver, twin))
    assert 0 < abs(rounded - exact) < 0.2


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts no allocator's rounding")
@pytest.mark.parametrize("name", FORMS)
def test_weights_are_counted_to_the_byte(name: str) -> None:
    arch = kept(name)
    driver = Driver(Runner(), arch, warm=False)
    held = sum(bytes_of(x) for x in weights(driver.runner._decoder))
    assert 0 <= memory.weight_bytes(driver.config) - held <= 512 * 120


def weights(decoder: Any) -> list[Any]:
    found = [decoder.embed, decoder.final_norm, decoder.head]
    for layer in decoder.layers:
        for room in (layer, layer.mixer, layer.ffn):
            found += [x for x in vars(room).values() if isinstance(x, torch.Tensor | QuantWeight | Parts)]
    return found


def bytes_of(weight: Any) -> int:
    if isinstance(weight, Parts):
        return sum(map(bytes_of, weight.parts))
    return weight.num_bytes if isinstance(weight, QuantWeight) else weight.numel() * weight.element_size()


def test_products_take_what_was_planned() -> None:
    """Beside a plain model's: 4 bits turned back where rows are many, rounded inputs; nothing of a plain model."""
    config = Driver(Runner(), kept("awq"), warm=False, device=DEVICE.type).config
    down = 64 * 96 * 4  # f32
    gate_up = 2 * down
    assert memory.unpacked_bytes(config, 200) == max(gate_up + 200 * 64 * 4, down + 200 * 96 * 4)
    assert memory.unpacked_bytes(config, 100) == 100 * 96 * 4  # of down
    fp8 = replace(config, arch=kept("fp8"))
    assert memory.unpacked_bytes(fp8, 200) == 200 * 96 * 4
    some = replace(config, arch=kept("some"))  # q, k and v apart: their outputs are joined
    assert memory.unpacked_bytes(some, 100) == 100 * (64 + 128) * 4
    assert memory.unpacked_bytes(replace(config, arch=replace(config.arch, quant=None)), 200) == 0
