"""What would make a model fit: every single change that does by itself, with its value, each one tried.

Called by entrypoints/plan_command.py for a plan that does not fit. A change that `serve` refuses today is marked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.capacity.plan import Ask, Plan, measure, with_length
from engine.config import CacheConfig, ScheduleConfig
from engine.errors import ConfigError
from engine.memory import halves
from engine.specs.arch import ArchSpec
from engine.specs.chips import Slice, chips_of_kind

MOST_SHARE = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """change: flags as they would be given. served: false where `twinfer serve` refuses it today."""

    change: str
    served: bool


def remedies(arch: ArchSpec, plan: Plan) -> list[Remedy]:
    """In the order in which they cost least of the model's numbers: memory, chips, then bits."""
    changes = [*settings(arch, plan), *devices(arch, plan), *bits(arch, plan)]
    return [
        Remedy(change=change, served=set(changed.refused) <= set(plan.refused))
        for change, changed in changes
        if changed is not None
    ]


def fitting(arch: ArchSpec, ask: Ask) -> Plan | None:
    """None where it does not fit or cannot be: heads that do not divide, a batch of more rows than tokens."""
    try:
        plan = measure(arch, ask)
    except ConfigError:
        return None
    return plan if plan.fits else None


def settings(arch: ArchSpec, plan: Plan) -> Iterator[tuple[str, Plan | None]]:
    """A shorter length, fewer rows or tokens of a step, a larger share of the memory."""
    ask, resolved = plan.ask, plan.resolved
    if plan.parts["weights"] > ask.slice.chip.memory_bytes:
        return  # nothing here makes them smaller
    page = max(resolved.runner.page_tokens)
    if resolved.max_model_len_given:
        low, high = 0, resolved.max_model_len // page  # pages; `low` fits or is none, `high` + 1 does not
        while low < high:
            middle = (low + high + 1) // 2
            there = fitting(arch, with_length(ask, middle * page)) is not None
            low, high = (middle, high) if there else (low, middle - 1)
        if low:
            yield f"--max-model-len {low * page}", fitting(arch, with_length(ask, low * page))
    rows, tokens = resolved.max_num_seqs, resolved.max_num_batched_tokens  # the other one stays, given or not
    for fewer in halves(rows):
        changed = fitting(arch, with_schedule(ask, ScheduleConfig(max_num_seqs=fewer, max_num_batched_tokens=tokens)))
        if changed is not None:
            yield f"--max-num-seqs {fewer}", changed
            break
    for fewer in halves(tokens):
        changed = fitting(arch, with_schedule(ask, ScheduleConfig(max_num_seqs=rows, max_num_batched_tokens=fewer)))
        if changed is not None:
            yield f"--max-num-batched-tokens {fewer}", changed
            break
    memory = ask.slice.chip.memory_bytes
    unused = ask.config.cache.gpu_memory_utilization - plan.usable_bytes / memory  # of the process itself
    share = math.ceil((plan.needed_bytes + plan.least_kv_bytes) / memory * 100 + unused * 100) / 100
    if ask.config.cache.gpu_memory_utilization < share <= MOST_SHARE:
        cache = replace(ask.config.cache, gpu_memory_utilization=share)
        yield f"--gpu-memory-utilization {share:g}", fitting(arch, with_cache(ask, cache))


def devices(arch: ArchSpec, plan: Plan) -> Iterator[tuple[str, Plan | None]]:
    """More ranks of the same slice, the next slice of the same chip, and the smallest of each other chip."""
    ask = plan.ask
    if plan.ranks * plan.copies < ask.slice.num_devices:
        ranks = ask.slice.num_devices // plan.copies
        yield f"--tensor-parallel-size {ranks}", fitting(arch, replace(ask, ranks=ranks))
    if plan.copies > 1:
        given = "" if ask.ranks is None else f" --tensor-parallel-size {ask.slice.num_devices}"
        changed = fitting(arch, replace(ask, ranks=ask.slice.num_devices, copies=1))
        yield f"--data-parallel-size 1{given}", changed
    chips = chips_of_kind(ask.slice.chip.kind)
    for chip in sorted(chips, key=lambda chip: chip is not ask.slice.chip):
        for topology in chip.topologies:
            other = Slice(chip=chip, topology=topology)
            if chip is ask.slice.chip and other.num_chips <= ask.slice.num_chips:
                continue
            ranks = other.num_devices // plan.copies
            changed = fitting(arch, replace(ask, slice=other, ranks=ranks))
            if changed is not None:
                given = "" if ask.ranks is None else f" --tensor-parallel-size {ranks}"
                yield f"--{chip.kind} {other.text}{given}", changed
                break


def bits(arch: ArchSpec, plan: Plan) -> Iterator[tuple[str, Plan | None]]:
    """Weights and pages of half the bytes."""
    ask, runner = plan.ask, plan.resolved.runner
    if plan.arch.quant is None:
        model = replace(ask.config.model, quantization="fp8")
        yield "--quantization fp8", fitting(arch, replace(ask, config=replace(ask.config, model=model)))
    if runner.kv_dtype != "fp8_e4m3":
        cache = replace(ask.config.cache, kv_cache_dtype="fp8")
        yield "--kv-cache-dtype fp8", fitting(arch, with_cache(ask, cache))


def with_cache(ask: Ask, cache: CacheConfig) -> Ask:
    return replace(ask, config=replace(ask.config, cache=cache))


def with_schedule(ask: Ask, schedule: ScheduleConfig) -> Ask:
    schedule = replace(schedule, async_scheduling=ask.config.schedule.async_scheduling)
    return replace(ask, config=replace(ask.config, schedule=schedule))
