"""The body of `twinfer compile`: from the flags of a server to a bundle of its programs, with no weights read.

Goes the way of engine/core/start.py as far as shapes go: describe, resolve, plan the cache; then the backend's builder
compiles what a runner would. Called by the CLI.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from engine.config import EngineConfig
from engine.core.start import kv_budget
from engine.entrypoints.compile_worker import CompileLaunch, Task
from engine.entrypoints.compile_workers import Workers, default_jobs
from engine.errors import ConfigError, check
from engine.resolve import plan_cache, resolve
from engine.runner import Measure, Progress, load_builder
from engine.specs.cache import CacheLayout
from engine.specs.checkpoint import read_config
from engine.specs.executables import Compiled, check_target
from engine.specs.families import parse_config


@dataclass(frozen=True, slots=True)
class Where:
    """tpu: the slice that programs are for, None = this machine's device. jobs: processes, None = by this machine."""

    tpu: str | None = None
    jobs: int | None = None


def run(config: EngineConfig, model: Path, target: Path, where: Where, progress: Progress) -> list[str]:
    """Build the bundle `target`; returns lines for the user. Raises ConfigError."""
    refuse(config, where)
    check_target(target)
    begun = time.monotonic()
    builder = load_builder("jax")
    device = builder.describe(config.device, where.tpu)
    resolved = resolve(config, parse_config(read_config(model)), device)
    builder.configure(resolved.runner)
    with ExitStack() as stack:
        workers = start_workers(config, model, where)
        if workers is not None:
            stack.callback(workers.close)
            workers.check_key(builder.key())
        budget = kv_budget(config, device, builder.cache_budget_bytes(measure_in(workers)), None)
        layout, length, notes = plan_cache(config, resolved, budget)
        built = builder.build(layout, target, progress, compile_in(workers, layout))
    pages = " + ".join(f"{pool.num_pages - 1:,}" for pool in layout.pools)
    runtime = built.key["runtime"]
    jobs = "" if workers is None else f" in {workers.jobs} processes"
    return [
        *(f"note: {note}" for note in (*resolved.notes, *notes)),
        f"{target}: {built.num_programs} programs for {device.name} ({runtime}), {pages} KV pages of "
        f"{layout.groups[0].page_tokens} tokens, requests of {length:,} tokens",
        f"{built.num_programs} programs, {built.num_bytes:,} bytes, {time.monotonic() - begun:.1f} s{jobs}",
    ]


def start_workers(config: EngineConfig, model: Path, where: Where) -> Workers | None:
    """Processes for a TPU that is not here, where more than one is wanted. Elsewhere threads compile."""
    jobs = 1 if where.tpu is None else default_jobs() if where.jobs is None else where.jobs
    if jobs == 1:
        return None
    return Workers(jobs, CompileLaunch(config=config, model_path=str(model.absolute()), tpu=where.tpu))


def measure_in(workers: Workers | None) -> Measure | None:
    if workers is None:
        return None
    return lambda names: [answer.sizes for answer in workers.map([Task(name=name, num_pages=()) for name in names])]


def compile_in(workers: Workers | None, layout: CacheLayout) -> Callable[[list[str]], Iterable[Compiled]] | None:
    if workers is None:
        return None
    pages = tuple(pool.num_pages for pool in layout.pools)

    def compiled(names: list[str]) -> Iterator[Compiled]:
        for answer in workers.map([Task(name=name, num_pages=pages) for name in names]):
            check(answer.program is not None, "an answer without a program")
            yield answer.program  # type: ignore[misc]

    return compiled


def refuse(config: EngineConfig, where: Where) -> None:
    """Raise ConfigError for what cannot be compiled ahead."""
    if config.backend not in ("auto", "jax"):
        raise ConfigError(f"--backend: {config.backend!r} has no executables to build ahead; expected jax or auto")
    if config.executables is not None:
        raise ConfigError("--executables: twinfer compile writes a bundle and loads none; name the new one with -o")
    tpu = where.tpu
    if where.jobs is not None and (tpu is None or where.jobs < 1):
        wanted = "an integer >= 1" if tpu is not None else "no --jobs without --tpu: threads compile for a device here"
        raise ConfigError(f"--jobs: {where.jobs} is not accepted; expected {wanted}")
    if tpu is not None and config.device not in ("auto", "tpu"):
        raise ConfigError(f"--tpu: {tpu!r} and --device {config.device} contradict each other; leave one of them out")
