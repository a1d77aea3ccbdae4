"""One quantization_config of each form, and a small config.json around it. Used by the tests of engine/specs/quant."""

from __future__ import annotations

from typing import Any

from tests.engine.specs.damage import CONFIG

SIZES = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "vocab_size": 24}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM", "zero_point": True}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}
BLOCK: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
STATIC: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static"}
INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKEN: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(weights: dict[str, Any], acts: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    form = "pack-quantized" if weights["num_bits"] == 4 else "naive-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": acts}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "format": form,
        "ignore": ["lm_head"],
        **changes,
    }


ALL = {
    "awq": AWQ,
    "gptq": GPTQ,
    "block": BLOCK,
    "static": STATIC,
    "int4": compressed(INT4),
    "int8": compressed(INT8, TOKEN),
}


def config(quant: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    return {**CONFIG, **SIZES, "quantization_config": quant, **changes}
