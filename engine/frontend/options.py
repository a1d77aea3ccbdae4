"""Keyword arguments of LLM, by vLLM's names, into an EngineConfig. Unknown names are refused with the nearest known
one.
"""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError

PARTS = ("model", "cache", "schedule", "parallel")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "enforce_eager": (False, None),
    "tokenizer_mode": ("auto",),
    "enable_lora": (False,),
    "enable_chunked_prefill": (True, None),
    "disable_custom_all_reduce": (False,),
    "cpu_offload_gb": (0,),
    "swap_space": (0,),
}
"""vLLM arguments that twinfer has no switch for: the values that mean what it does anyway."""


def engine_config(options: dict[str, Any]) -> EngineConfig:
    """Raises ConfigError naming the argument."""
    options = dict(options)
    if "disable_log_stats" in options:
        options["log_stats"] = not options.pop("disable_log_stats")
    for name, accepted in NEUTRAL.items():
        if name in options and options.pop(name) not in accepted:
            raise ConfigError(f"{name}: only {' or '.join(map(repr, accepted))} is supported; leave it out")
    config = EngineConfig()
    names = {f.name: part for part in PARTS for f in fields(getattr(config, part))}
    own = {f.name for f in fields(config)} - set(PARTS)
    known = [*names, *own]
    for name, value in options.items():
        if name == "served_model_name" and isinstance(value, str):
            value = (value,)
        if name == "max_model_len" and value == "auto":
            value = -1
        if name in names:
            part = replace(getattr(config, names[name]), **{name: value})
            config = replace(config, **{names[name]: part})
        elif name in own:
            config = replace(config, **{name: value})
        else:
            near = get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(f"{name}: not an argument of LLM; did you mean {near[0]!r}?")
    return config
