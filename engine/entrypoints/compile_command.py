"""The body of `twinfer compile`: from the flags of a server to a bundle of its programs, with no weights read.

Goes the way of engine/core/start.py as far as shapes go: describe, resolve, plan the cache; then the backend's builder
compiles what a runner would. Called by the CLI.
"""

from __future__ import annotations

import time
from pathlib import Path

from engine.config import EngineConfig
from engine.core.start import kv_budget
from engine.errors import ConfigError
from engine.resolve import plan_cache, resolve
from engine.runner import Progress, load_builder
from engine.specs.checkpoint import read_config
from engine.specs.executables import check_target
from engine.specs.families import parse_config


def run(config: EngineConfig, model: Path, target: Path, tpu: str | None, progress: Progress) -> list[str]:
    """Build the bundle `target`; returns lines for the user. Raises ConfigError."""
    refuse(config, tpu)
    check_target(target)
    begun = time.monotonic()
    builder = load_builder("jax")
    device = builder.describe(config.device, tpu)
    resolved = resolve(config, parse_config(read_config(model)), device)
    builder.configure(resolved.runner)
    budget = kv_budget(config, device, builder.cache_budget_bytes(), None)
    layout, length, notes = plan_cache(config, resolved, budget)
    built = builder.build(layout, target, progress)
    pages = " + ".join(f"{pool.num_pages - 1:,}" for pool in layout.pools)
    runtime = built.key["runtime"]
    return [
        *(f"note: {note}" for note in (*resolved.notes, *notes)),
        f"{target}: {built.num_programs} programs for {device.name} ({runtime}), {pages} KV pages of "
        f"{layout.groups[0].page_tokens} tokens, requests of {length:,} tokens",
        f"{built.num_programs} programs, {built.num_bytes:,} bytes, {time.monotonic() - begun:.1f} s",
    ]


def refuse(config: EngineConfig, tpu: str | None) -> None:
    """Raise ConfigError for what cannot be compiled ahead."""
    if config.backend not in ("auto", "jax"):
        raise ConfigError(f"--backend: {config.backend!r} has no executables to build ahead; expected jax or auto")
    if config.executables is not None:
        raise ConfigError("--executables: twinfer compile writes a bundle and loads none; name the new one with -o")
    if tpu is not None and config.device not in ("auto", "tpu"):
        raise ConfigError(f"--tpu: {tpu!r} and --device {config.device} contradict each other; leave one of them out")
