"""The memory plan of a device, before anything is allocated on it: what the model takes and what is left for KV pages.

A runner works out bytes by purpose from a RunnerConfig (`memory_plan`); this file holds them against the device, names
the flag to change and its value where they do not fit, and words the line that start-up logs. Called by
engine/core/start.py. Pure: no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.resolve import GIB, Resolved, kv_bytes_of
from engine.runner import ON_DEMAND, DeviceInfo, RunnerConfig
from engine.specs.cache import CacheLayout

OWN_BYTES = GIB  # of what is in use when the engine starts, at most so much is taken for this process's own context
KEPT_SHARE = 128  # 1 / so much of the device stays free: other processes grow a little

Parts = Callable[[RunnerConfig], Mapping[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on one device."""

    parts: dict[str, int] = field(default_factory=dict)  # by purpose, without the KV cache
    free: int  # when the engine started
    usable: int  # of those, what --gpu-memory-utilization leaves to the engine

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def kv_bytes(self) -> int:
        """Left for KV pages."""
        return max(0, self.usable - self.needed)


def plan_memory(config: EngineConfig, resolved: Resolved, device: DeviceInfo, parts_of: Parts) -> MemoryPlan | None:
    """None where the backend does not plan. Raises ConfigError with cause and remedy where the model does not fit."""
    parts = dict(parts_of(resolved.runner))
    if not parts:
        return None
    plan = MemoryPlan(parts=parts, free=device.free_bytes, usable=usable_bytes(config, device))
    pages = least_kv_bytes(resolved)
    if plan.needed + pages <= plan.usable:
        return plan
    raise ConfigError(
        f"--gpu-memory-utilization: {config.cache.gpu_memory_utilization:g} of {device.name} leaves "
        f"{gib(plan.usable)} ({gib(plan.free)} of {gib(device.memory_bytes)} are free), but {words(parts)} and "
        f"{gib(pages)} of KV cache need {gib(plan.needed + pages)}; {remedy(config, resolved, device, parts_of)}"
    )


def usable_bytes(config: EngineConfig, device: DeviceInfo) -> int:
    """What the engine may still take: its share of the device, and no more than is free.

    An explicit --kv-cache-memory-bytes overrules the share, as in vLLM.
    """
    left = device.free_bytes - device.memory_bytes // KEPT_SHARE
    if config.cache.kv_cache_memory_bytes is not None:
        return left
    own = min(device.memory_bytes - device.free_bytes, OWN_BYTES)
    return min(left, int(config.cache.gpu_memory_utilization * device.memory_bytes) - own)


def least_kv_bytes(resolved: Resolved) -> int:
    """One sequence of the length that was asked for; without one, a page of each group."""
    page = max(resolved.runner.page_tokens)
    return kv_bytes_of(resolved, resolved.max_model_len if resolved.max_model_len_given else page)


def remedy(config: EngineConfig, resolved: Resolved, device: DeviceInfo, parts_of: Parts) -> str:
    """What to change, and to what: every single flag that would do by itself."""
    runner, usable, pages = resolved.runner, usable_bytes(config, device), least_kv_bytes(resolved)

    def needs(**changes: int) -> int:
        return sum(parts_of(replace(runner, **changes)).values()) + pages  # type: ignore[arg-type]

    found = []
    tokens, seqs = resolved.max_num_batched_tokens, resolved.max_num_seqs
    fewer_tokens = [n for n in halves(tokens) if n >= seqs and needs(max_batched_tokens=n) <= usable]
    if fewer_tokens:
        found.append(f"lower --max-num-batched-tokens to {fewer_tokens[0]}")
    fewer_seqs = [n for n in halves(seqs) if needs(max_slots=n) <= usable]
    if fewer_seqs:
        found.append(f"lower --max-num-seqs to {fewer_seqs[0]}")
    if not found:
        both = [n for n in halves(seqs) if needs(max_slots=n, max_batched_tokens=max(n, min(tokens, 256))) <= usable]
        if both:
            small = max(both[0], min(tokens, 256))
            found.append(f"lower --max-num-seqs to {both[0]} and --max-num-batched-tokens to {small}")
    own = min(device.memory_bytes - device.free_bytes, OWN_BYTES)
    share = math.ceil((needs() + own) / device.memory_bytes * 100) / 100
    left = device.free_bytes - device.memory_bytes // KEPT_SHARE
    if config.cache.gpu_memory_utilization < share <= 0.99 and needs() <= left:
        found.append(f"raise --gpu-memory-utilization to {share:g}")
    if found:
        return ", or ".join(found)
    taken = device.memory_bytes - device.free_bytes
    return f"use a device with more free memory ({gib(taken)} are in use), or --quantization fp8"


def halves(number: int) -> list[int]:
    """Half of a number, a quarter, and so on down to 1."""
    return [number >> n for n in range(1, number.bit_length())]


def check_pages(config: EngineConfig, plan: MemoryPlan, layout: CacheLayout) -> None:
    """Raise ConfigError if the pages that a flag asked for do not fit."""
    pages = sum(pool.num_pages * pool.page_bytes for pool in layout.pools)
    left = plan.free - plan.needed
    if pages <= left:
        return
    given = config.cache.num_gpu_blocks_override
    flag = "--kv-cache-memory-bytes" if given is None else "--num-gpu-blocks-override"
    value = config.cache.kv_cache_memory_bytes if given is None else given
    most = left if given is None else int(given * left / pages)
    raise ConfigError(
        f"{flag}: {value} asks for {gib(pages)} of KV cache, but {words(plan.parts)} leave {gib(max(0, left))} of "
        f"{gib(plan.free)} that are free; give at most {max(0, most)}"
    )


def report(plan: MemoryPlan, kv_bytes: int, peak: int) -> str:
    """The plan beside the most that the allocator held, in one line. peak: bytes, the KV pages among them."""
    waiting = plan.parts.get(ON_DEMAND, 0)
    planned = plan.needed - waiting + kv_bytes
    deviation = (planned / peak - 1) * 100 if peak else 0.0
    return (
        f"memory: {words(plan.parts)}, KV cache {gib(kv_bytes)}; planned {gib(planned)} without what comes on demand, "
        f"held at most {gib(peak)} ({deviation:+.1f} %)"
    )


def words(parts: Mapping[str, int]) -> str:
    """weights 15.0 GiB, ..."""
    return ", ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in parts.items())


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
