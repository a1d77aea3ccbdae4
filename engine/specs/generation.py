"""generation_config.json: the ids that end a generation, and the sampling defaults that a model's makers chose.

Read once at start-up. As in transformers, its eos_token_id replaces config.json's; sampling defaults are used where a
request leaves a field out (as vLLM does with --generation-config auto). A wrong value is refused, not skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import ConfigError, InvalidValue
from engine.params import BOUNDS, check_value
from engine.specs.arch import ArchSpec
from engine.specs.checkpoint import read_json
from engine.specs.families.fields import Fields

FILE_NAME = "generation_config.json"
SAMPLING_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""generation_config.json name -> SamplingParams name."""


def read_generation_config(path: Path) -> dict[str, Any]:
    """The parsed file of a checkpoint folder, {} where there is none. Raises CheckpointError."""
    file = path / FILE_NAME
    return read_json(file, "") if file.exists() else {}


def stop_ids(path: Path, arch: ArchSpec) -> tuple[int, ...]:
    """Ids that end a generation: those of generation_config.json, else config.json's. Raises ConfigError."""
    fields = Fields(read_generation_config(path), FILE_NAME)
    return fields.token_ids("eos_token_id", arch.vocab_size) or arch.eos_token_ids


def generation_defaults(path: Path) -> dict[str, int | float]:
    """SamplingParams fields that the checkpoint sets, e.g. {"temperature": 0.6, "top_k": 20}. Raises ConfigError."""
    config = read_generation_config(path)
    defaults: dict[str, int | float] = {}
    for name, field in SAMPLING_FIELDS.items():
        value = config.get(name)
        if value is None:
            continue
        try:
            check_value(field, value, BOUNDS[field])
        except InvalidValue as error:
            raise ConfigError(f"{FILE_NAME}: {name}: {error}") from None
        defaults[field] = value
    return defaults
