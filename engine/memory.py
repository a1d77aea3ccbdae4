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
from engine.resolve import GIB, Resolved, kv_bytes_of, longest_length
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
    """What to change, and to what: every flag that would do by itself."""
    usable, pages = usable_bytes(config, device), least_kv_bytes(resolved)
    needed = sum(parts_of(resolved.runner).values())
    found = []
    length = longest_length(resolved, lambda tokens: needed + kv_bytes_of(resolved, tokens) <= usable)
    if resolved.max_model_len_given and length:
        found.append(f"lower --max-model-len to {length}")
    found += smaller_steps(resolved, parts_of, usable - pages)
    share = enough_share(needed + pages, device)
    if share is not None and share > config.cache.gpu_memory_utilization:
        found.append(f"raise --gpu-memory-utilization to {share:g}")
    if found:
        return ", or ".join(found)
    taken = device.memory_bytes - device.free_bytes
    return f"use a device with more free memory ({gib(taken)} are in use), or --quantization fp8"


def smaller_steps(resolved: Resolved, parts_of: Parts, left: int) -> list[str]:
    """Fewer tokens or fewer rows whose parts fit into `left` bytes; both together where neither does alone."""
    tokens, seqs = resolved.max_num_batched_tokens, resolved.max_num_seqs

    def fits(rows: int, batched: int) -> bool:
        return sum(parts_of(replace(resolved.runner, max_slots=rows, max_batched_tokens=batched)).values()) <= left

    found = [f"lower --max-num-batched-tokens to {n}" for n in halves(tokens) if n >= seqs and fits(seqs, n)][:1]
    found += [f"lower --max-num-seqs to {n}" for n in halves(seqs) if fits(n, tokens)][:1]
    if not found:
        both = [(n, max(n, min(tokens, 256))) for n in halves(seqs)]
        found = [f"lower --max-num-seqs to {n} and --max-num-batched-tokens to {m}" for n, m in both if fits(n, m)][:1]
    return found


def enough_share(needed: int, device: DeviceInfo) -> float | None:
    """The least --gpu-memory-utilization, in hundredths, that leaves so many bytes; None where none does."""
    own = min(device.memory_bytes - device.free_bytes, OWN_BYTES)
    share = math.ceil((needed + own) / device.memory_bytes * 100) / 100
    free = device.free_bytes - device.memory_bytes // KEPT_SHARE
    return share if share <= 0.99 and needed <= free else None


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
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size / 2**20:.1f} MiB"
