"""quantization_config as published checkpoints spell it, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import ConfigError
from engine.specs.families import parse_config
from engine.specs.families.fields import Fields
from engine.specs.families.quantization import parse_fp8
from engine.specs.weights import param_table
from tests.engine.specs.quant_forms import AWQ, BLOCK, GPTQ, INT4, INT8, TOKEN, compressed, config

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes"}, "quant_method: 'bitsandbytes' .*fp8, compressed-tensors, awq, gptq"),
    ({"bits": 4}, "quant_method: is missing"),
    ({**AWQ, "bits": 8}, "bits: 8 .*expected 4"),
    ({**AWQ, "version": "gemv"}, "version: 'gemv' .*gemm"),
    ({**AWQ, "zero_point": False}, "zero_point: False"),
    ({**AWQ, "group_size": 48}, "self_attn.q_proj: 64 inputs are not whole groups of 48"),
    ({**AWQ, "group_size": 0}, "group_size: 0"),
    ({**AWQ, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert: 'lm_head' .*list"),
    ({**GPTQ, "bits": 3}, "bits: 3 .*expected 4"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format: 'marlin'"),
    ({**GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, r"dynamic: \+:\.\*"),
    ({**GPTQ, "pack_dtype": "int64"}, "pack_dtype: 'int64'"),
    ({**BLOCK, "weight_block_size": [64, 64]}, r"weight_block_size: \[64, 64\] .*\[128, 128\]"),
    ({**BLOCK, "fmt": "e5m2"}, "fmt: 'e5m2' .*e4m3"),
    ({**BLOCK, "scale_fmt": "ue8m0"}, "scale_fmt: 'ue8m0'"),
    ({**BLOCK, "activation_scheme": "static"}, "activation_scheme: 'static' .*dynamic"),
    (compressed({**INT4, "num_bits": 3}), "num_bits: 3 .*8, or 4 with type int"),
    (compressed({**INT4, "type": "float"}), "num_bits: 4 .*with type float"),
    (compressed({**INT4, "strategy": "tensor"}), "strategy: 'tensor' .*group or channel"),
    (compressed({**INT4, "group_size": None}), "group_size: None"),
    (compressed(INT4, TOKEN), "input_activations"),
    (compressed(INT4, format="marlin-24"), "format: 'marlin-24' .*pack-quantized"),
    (compressed(INT8, {**TOKEN, "num_bits": 4}), "num_bits: 4 .*8, as the weights"),
    (compressed(INT8, {**TOKEN, "type": "float"}), "type: 'float' .*int"),
    (compressed(INT8, {**TOKEN, "symmetric": False}), "symmetric: False"),
    (compressed(INT8, {**TOKEN, "strategy": "group"}), "strategy: 'group' .*token with dynamic true"),
    (compressed({**INT8, "symmetric": False}), "symmetric: False"),
    (compressed({**INT8, "strategy": "block"}), "strategy: 'block'"),
    (compressed(INT8, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    (compressed(INT8, transform_config={"config_groups": {"R1": {}}}), "transform_config"),
    (compressed(INT8, config_groups={}), "config_groups"),
    (compressed(INT8, ignore=["re:(a+)+b"]), "ignore: .*at most 4 repeats and none of a group"),
    (compressed(INT8, ignore=["re:.*.*.*.*.*x"]), "at most 4 repeats"),
    (compressed(INT8, ignore=["re:[a"]), "ignore: .*can be read"),
    (compressed(INT8, config_groups={"g": {"targets": ["Embedding"], "weights": INT8}}), "targets: .*Linear"),
]


@pytest.mark.parametrize("quant,message", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused_configs(quant: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(config(quant))
    assert "config.json: quantization_config" in str(caught.value)


ARGS = {"actorder": None, "block_structure": None, "group_size": None, "observer_kwargs": {}, "symmetric": True}
PUBLISHED: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen3-8B-FP8": (
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"],
        },
        "fp8 per block of 128 x 128, activations per 128 inputs",
    ),
    "Meta-Llama-3-8B-Instruct-FP8": (
        {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"},
        "fp8 per tensor, activations with fixed scales",
    ),
    "Meta-Llama-3.1-8B-Instruct-FP8-dynamic": (
        compressed(
            {**ARGS, "num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "observer": "minmax"},
            {**ARGS, "num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "observer": "memoryless"},
            format="float-quantized",
            global_compression_ratio=1.24,
            kv_cache_scheme=None,
            quantization_status="frozen",
        ),
        "fp8 per channel, activations per token",
    ),
    "Meta-Llama-3.1-8B-Instruct-quantized.w8a8": (
        compressed(
            {**ARGS, "num_bits": 8, "type": "int", "strategy": "channel", "dynamic": False, "observer": "mse"},
            {**ARGS, "num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "observer": None},
            format="int-quantized",
            quantization_status="compressed",
            sparsity_config={"format": "dense", "global_sparsity": 0.13, "sparsity_structure": "unstructured"},
        ),
        "int8 per channel, activations per token",
    ),
    "Meta-Llama-3.1-8B-Instruct-quantized.w4a16": (
        compressed(
            {**ARGS, "num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "actorder": "weight"},
            format="pack-quantized",
            version="0.11.0",
            transform_config={},
        ),
        "4 bits per group of 64",
    ),
    "Qwen2.5-7B-Instruct-GPTQ-Int4": (
        {
            "bits": 4,
            "checkpoint_format": "gptq",
            "damp_percent": 0.01,
            "desc_act": False,
            "group_size": 64,
            "model_name_or_path": None,
            "quant_method": "gptq",
            "static_groups": False,
            "sym": True,
            "true_sequential": True,
        },
        "4 bits per group of 64",
    ),
    "Llama-2-7B-GPTQ": (
        {
            "batch_size": 1,
            "bits": 4,
            "block_name_to_quantize": "model.layers",
            "dataset": "wikitext2",
            "desc_act": True,
            "disable_exllama": False,
            "group_size": 32,
            "modules_in_block_to_quantize": None,
            "quant_method": "gptq",
            "sym": True,
            "use_cuda_fp16": True,
        },
        "4 bits per group of 32, act order",
    ),
    "Qwen2.5-7B-Instruct-AWQ": (
        {
            "bits": 4,
            "group_size": 64,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
        "4 bits per group of 64",
    ),
}
"""As published checkpoints spell it, but for the group size, which must divide the sizes here."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    quant, text = PUBLISHED[name]
    arch = parse_config(config(quant))
    assert {p.quant.text for p in param_table(arch) if p.quant is not None} == {text}
    assert {p.quant for p in param_table(arch) if p.weight in ("embed", "head")} == {None}


def test_early_spellings() -> None:
    """compression_config, as the first compressed-tensors wrote it; both places must agree."""
    arch = parse_config({**config(None), "compression_config": compressed(INT8)})
    assert arch.quant is not None and arch.quant.method == "compressed-tensors"
    with pytest.raises(ConfigError, match="the same as"):
        parse_config({**config(AWQ), "compression_config": compressed(INT8)})
    assert parse_fp8(Fields({"fmt": None})).rules[0][1].act == "token"
