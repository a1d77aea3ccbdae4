"""config.json -> ArchSpec. One parser of a few lines per family; the table below is all that the engine knows.

A checkpoint's own code (`auto_map`) is never read. A model_type that is not in the table is refused with the list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from engine.errors import ConfigError
from engine.specs.arch import ArchSpec
from engine.specs.families import dense, gemma
from engine.specs.families.fields import Fields
from engine.specs.families.quantization import parse_quantization
from engine.specs.weights import param_table

PARSERS: dict[str, Callable[[Fields], ArchSpec]] = {
    "llama": dense.parse_llama,
    "mistral": dense.parse_mistral,
    "qwen2": dense.parse_qwen2,
    "qwen3": dense.parse_qwen3,
    "gemma2": gemma.parse_gemma2,
    "gemma3_text": gemma.parse_gemma3_text,
    "gemma3": gemma.parse_gemma3,
    "phi3": dense.parse_phi3,
}


def parse_config(config: Mapping[str, Any]) -> ArchSpec:
    """The architecture that a config.json describes. Raises ConfigError naming the field and what is accepted."""
    fields = Fields(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in PARSERS:
        fields.refuse("model_type", "one of " + ", ".join(sorted(PARSERS)))
    try:
        arch = replace(PARSERS[model_type](fields), quant=parse_quantization(fields))
        if arch.quant is not None:
            param_table(arch)  # refuses sizes that the form cannot have
        return arch
    except RecursionError:
        raise ConfigError("config.json: nested too deeply") from None
