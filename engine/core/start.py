"""From an EngineConfig to a running CoreLoop: describe, resolve, configure, load, plan the cache, allocate, warm up.

Called by engine/core/process.py (own process) and by the in-process client. The one place that knows the order of the
runner's life and times it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engine.config import EngineConfig
from engine.core.loop import CoreLoop, Loop
from engine.core.messages import CoreReady
from engine.core.timeline import Timeline
from engine.errors import ConfigError
from engine.executor.base import Executor, SameProcess
from engine.memory import MemoryPlan, check_pages, plan_memory, report
from engine.resolve import Resolved, plan_cache, resolve
from engine.runner import DeviceInfo, Placement, Progress, RunnerConfig, load_runner
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.scheduler import Scheduler
from engine.specs.cache import CacheLayout
from engine.specs.checkpoint import read_config
from engine.specs.executables import read_manifest
from engine.specs.families import parse_config

log = logging.getLogger("twinfer.core")


@dataclass(frozen=True, slots=True)
class Backend:
    name: str
    reason: str


def has_tpu() -> bool:
    """A TPU VM shows its chips as /dev/accel* or /dev/vfio/* and has libtpu installed."""
    chips = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and find_spec("libtpu") is not None


def has_nvidia_gpu() -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible != "" and visible != "-1" and any(Path("/dev").glob("nvidia[0-9]*"))


def choose_backend(requested: str, device: str) -> Backend:
    """auto: TPU -> jax; NVIDIA GPU with torch -> torch; else jax. Looks without importing a framework."""
    if device == "xla" and requested == "jax":
        raise ConfigError("--device: 'xla' is torch-xla, not jax; use --backend torch, or --device tpu with jax")
    if requested != "auto":
        return Backend(requested, "as asked")
    if device == "xla":
        return Backend("torch", "--device xla")
    if device in ("auto", "tpu") and has_tpu():
        return Backend("jax", "a TPU was found")
    if device in ("auto", "cuda", "gpu") and has_nvidia_gpu():
        if find_spec("torch") is not None:
            return Backend("torch", "an NVIDIA GPU and torch were found")
        return Backend("jax", "an NVIDIA GPU was found, and torch is not installed")
    return Backend("jax", "no accelerator was found" if device == "auto" else f"--device {device}")


def start_core(config: EngineConfig, model_path: Path, progress: Progress | None = None) -> tuple[Loop, CoreReady]:
    """Build everything and warm it up. Raises StartupError (one line, with the remedy)."""
    timeline = Timeline()
    timeline.done("process")  # until here: python itself, and what the caller imported and did
    progress = timeline.watch(progress)
    arch = parse_config(read_config(model_path))
    timeline.done("config")
    backend = choose_backend(config.backend, config.device)
    runner = load_runner(backend.name)
    timeline.done("import")
    device = runner.describe(config.device)
    timeline.done("describe")
    resolved = resolve(config, arch, device)
    plan = plan_memory(config, resolved, device, runner.memory_plan)
    runner.configure(resolved.runner, Placement())
    timeline.done("configure")
    runner.load(None if config.model.load_format == "dummy" else model_path, progress)
    timeline.done("load")
    budget = kv_budget(config, device, runner.cache_budget_bytes(), plan)
    bundle = None if config.executables is None else read_manifest(Path(config.executables))
    layout, max_model_len, notes = plan_cache(config, resolved, budget, None if bundle is None else bundle.num_pages)
    if plan is not None:
        check_pages(config, plan, layout)
    runner.allocate_cache(layout)
    timeline.done("allocate")
    runner.warm_up(progress)
    timeline.done("warm_up")
    loop = make_loop(scheduler_config(config, resolved, max_model_len), resolved.runner, layout, SameProcess(runner))
    facts = ready(resolved, layout, device, max_model_len)
    facts.backend, facts.backend_reason = backend.name, backend.reason
    facts.notes = [*resolved.notes, *notes]
    facts.num_compiles = runner.num_compiles()
    if bundle is not None:
        facts.notes.append(
            f"{len(bundle.programs)} programs loaded from {config.executables}, {facts.num_compiles} compiled"
        )
    timeline.done("scheduler")
    facts.startup_s = timeline.seconds
    log.info("%s", timeline.table())
    if plan is not None:
        kv_bytes = sum(pool.num_pages * pool.page_bytes for pool in layout.pools)
        peak = runner.memory_peak()
        facts.memory = {**plan.parts, "kv_cache": kv_bytes, "peak": peak}
        log.info("%s", report(plan, kv_bytes, peak))
    return loop, facts


def make_loop(schedule: SchedulerConfig, runner: RunnerConfig, layout: CacheLayout, executor: Executor) -> Loop:
    """A scheduler, or one for each data replica."""
    if runner.num_replicas == 1:
        return CoreLoop(Scheduler(schedule, layout), executor, depth=runner.max_in_flight)
    from engine.core.replicas import ReplicaLoop, Replicas

    replicas = Replicas([Scheduler(schedule, layout) for _ in range(runner.num_replicas)])
    return ReplicaLoop(replicas, executor, depth=runner.max_in_flight)


def kv_budget(config: EngineConfig, device: DeviceInfo, left: int, plan: MemoryPlan | None) -> int:
    """Bytes for the KV pool: as planned, or less if other processes have grown since; without a plan what is left.

    left: what the runner says. A CPU runner names a modest share of the host's memory by itself: the host is not the
    engine's alone.
    """
    if plan is not None:
        return min(left, plan.kv_bytes)
    if device.kind in ("gpu", "tpu"):
        left -= int((1 - config.cache.gpu_memory_utilization) * device.memory_bytes)
    return max(0, left)


def scheduler_config(config: EngineConfig, resolved: Resolved, max_model_len: int) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_model_len=max_model_len,
        token_buckets=resolved.runner.token_buckets,
        row_buckets=resolved.runner.row_buckets,
        policy=config.schedule.scheduling_policy,
        long_prefill_token_threshold=config.schedule.long_prefill_token_threshold,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        max_in_flight=resolved.runner.max_in_flight,
        max_num_steps=resolved.runner.max_num_steps,
        max_turn_rows=resolved.runner.max_turn_rows,
        vocab_size=resolved.runner.arch.vocab_size,
        max_logprobs=resolved.runner.sampler_limits.max_logprobs,
    )


def ready(resolved: Resolved, layout: CacheLayout, device: DeviceInfo, max_model_len: int) -> CoreReady:
    pages = min(pool.num_pages - 1 for pool in layout.pools)
    return CoreReady(
        max_model_len=max_model_len,
        vocab_size=resolved.runner.arch.vocab_size,
        num_pages=sum(pool.num_pages - 1 for pool in layout.pools) * resolved.runner.num_replicas,
        page_tokens=layout.groups[0].page_tokens,
        kv_tokens=pages * layout.groups[0].page_tokens * resolved.runner.num_replicas,
        max_logprobs=resolved.runner.sampler_limits.max_logprobs,
        backend="",
        device=device.name,
        dtype=resolved.runner.dtype,
        startup_s={},
    )
