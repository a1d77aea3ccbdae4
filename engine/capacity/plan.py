"""Does a model fit a slice of chips, with what room, and how fast could a step be: the body of `twinfer plan`.

Decides as a start does: the same resolve, the same page counts, with a chip's data sheet in place of a device
(parts.device_info) and one rank of the model (specs/parallel.rank_arch) in place of the whole. Pure; no framework.
Called by entrypoints/plan_command.py and by remedies.py, which asks again with one thing changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from engine.capacity.floors import Floor, Model, decode_floor, prefill_floor
from engine.capacity.parts import KV_FORMS, QUANTIZATION, device_info, parts, weight_sizes, weight_tensors
from engine.config import EngineConfig, ParallelConfig
from engine.errors import ConfigError
from engine.memory import least_kv_bytes, usable_bytes
from engine.resolve import (
    Resolved,
    check_replicas,
    check_tensor,
    pages_of,
    plan_cache,
    refuse_unsupported,
    resolve,
    resolve_kv_dtype,
    resolve_quantization,
)
from engine.runner import DeviceInfo
from engine.specs.arch import ArchSpec
from engine.specs.cache import CacheLayout, GroupKind
from engine.specs.chips import Slice
from engine.specs.parallel import check_parallel, rank_arch
from engine.specs.quant import FORMS

USUAL_CONTEXT = 4096  # tokens of a request where nobody says how many


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is to be planned. config.parallel is not read.

    ranks: --tensor-parallel-size, None = all devices of a copy. copies: --data-parallel-size. context: tokens of each
    request of the largest batch, None = --max-model-len, or USUAL_CONTEXT.
    """

    slice: Slice
    config: EngineConfig
    ranks: int | None = None
    copies: int | None = None
    context: int | None = None

    def split(self) -> tuple[int, int]:
        """(ranks, copies). Raises ConfigError."""
        devices, copies = self.slice.num_devices, 1 if self.copies is None else self.copies
        ranks = devices // max(1, copies) if self.ranks is None else self.ranks
        for flag, value in (("--data-parallel-size", copies), ("--tensor-parallel-size", ranks or self.ranks)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag}: {value} is not accepted; expected an integer >= 1")
        if max(1, ranks) * copies > devices:
            raise ConfigError(
                f"--tensor-parallel-size: {max(1, ranks)} x {copies} copies (--data-parallel-size) are more than the "
                f"{devices} devices of {self.slice.text}; lower one of them"
            )
        return ranks, copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes are of one device, counts of requests and tokens of one copy of the model.

    refused: what `twinfer serve` would refuse of it today, in its own words. Where it does not fit, what comes after
    `least_kv_bytes` is empty.
    """

    ask: Ask
    ranks: int
    copies: int
    resolved: Resolved
    arch: ArchSpec  # the whole model, its weights kept as asked for
    usable_bytes: int
    parts: Mapping[str, int]
    least_kv_bytes: int  # of one request of --max-model-len, or of a page of each group
    refused: tuple[str, ...]
    notes: tuple[str, ...] = ()
    kv_cache_bytes: int = 0  # pages that are made
    max_model_len: int = 0
    largest_context: int = 0
    kv_tokens: int = 0
    context: int = 0
    largest_batch: int = 0
    floors: tuple[Floor, ...] = ()

    @property
    def needed_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.needed_bytes + self.least_kv_bytes <= self.usable_bytes

    @property
    def free_bytes(self) -> int:
        """Usable and used for nothing."""
        return self.usable_bytes - self.needed_bytes - self.kv_cache_bytes


def make_plan(arch: ArchSpec, ask: Ask) -> Plan:
    """Raises ConfigError for what no chip would take: sizes that do not divide, unknown types, lengths too long."""
    check_split(arch, ask)
    plan = measure(arch, ask)
    return fill(arch, plan) if plan.fits else plan


def check_split(arch: ArchSpec, ask: Ask) -> None:
    """Raises ConfigError, with a split that can be where none was asked for."""
    ranks, copies = ask.split()
    try:
        check_parallel(arch, ranks)
    except ConfigError as error:
        if ask.ranks is not None:
            raise
        fewer = next(size for size in range(ranks - 1, 0, -1) if ranks % size == 0 and can_split(arch, size))
        raise ConfigError(
            f"{error}; for the {ask.slice.num_devices} devices of {ask.slice.text} give --tensor-parallel-size {fewer} "
            f"--data-parallel-size {ranks // fewer * copies}"
        ) from None


def can_split(arch: ArchSpec, ranks: int) -> bool:
    try:
        check_parallel(arch, ranks)
    except ConfigError:
        return False
    return True


def measure(arch: ArchSpec, ask: Ask) -> Plan:
    """Whether it fits."""
    ranks, copies = ask.split()
    config = replace(ask.config, parallel=ParallelConfig())
    device = device_info(ask.slice.chip)
    # what the engine could hold
    able = replace(device, quantization=QUANTIZATION, weight_forms=FORMS, kv_dtypes=KV_FORMS)
    resolved = resolve(config, rank_arch(arch, ranks), able)
    whole = replace(arch, quant=resolved.runner.arch.quant)
    tensors = weight_tensors(whole, ranks, resolved.runner.dtype, device.kind)
    return Plan(
        ask=ask,
        ranks=ranks,
        copies=copies,
        resolved=resolved,
        arch=whole,
        usable_bytes=usable_bytes(config, device),
        parts=parts(resolved.runner, tensors.values(), device.kind),
        least_kv_bytes=least_kv_bytes(resolved),
        refused=refusals(arch, ask, device, resolved.runner.dtype),
        notes=resolved.notes,
    )


def refusals(arch: ArchSpec, ask: Ask, device: DeviceInfo, dtype: str) -> tuple[str, ...]:
    """What serve would say today to an engine as planned, on this device."""
    ranks, copies = ask.split()
    config = replace(ask.config, parallel=ParallelConfig(tensor_parallel_size=ranks, data_parallel_size=copies))
    driven = ask.slice.num_devices if device.kind == "tpu" else 1  # by one process
    checks: tuple[Callable[[], object], ...] = (
        lambda: refuse_unsupported(config),
        lambda: check_tensor(ranks, arch, replace(device, num_devices=driven)),
        lambda: check_replicas(copies, ranks, replace(device, num_devices=driven)),
        lambda: resolve_quantization(config.model.quantization, arch, device),
        lambda: resolve_kv_dtype(config.cache.kv_cache_dtype, dtype, device),
    )
    found = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            found.append(str(error))
    return tuple(found)


def fill(arch: ArchSpec, plan: Plan) -> Plan:
    """The plan with its pages, and what they hold."""
    ask, resolved = plan.ask, plan.resolved
    config = replace(ask.config, parallel=ParallelConfig())
    layout, length, notes = plan_cache(config, resolved, plan.usable_bytes - plan.needed_bytes)
    largest = length
    if resolved.max_model_len_given:
        unbound = measure(arch, with_length(ask, None))
        if unbound.fits:
            budget = unbound.usable_bytes - unbound.needed_bytes
            largest = max(length, plan_cache(config, unbound.resolved, budget)[1])
    context = ask.context or (length if resolved.max_model_len_given else min(length, USUAL_CONTEXT))
    if not 1 <= context <= length:
        raise ConfigError(f"--context: {context} is not accepted; expected 1 .. {length}, the longest request here")
    batch = batch_of(resolved, layout, context)
    if len(layout.pools) > 1 and context < length:
        # pools are cut for requests of the whole length, which hold fewer pages of a window than their share
        shorter = measure(arch, with_length(ask, context))
        cut = plan_cache(config, shorter.resolved, shorter.usable_bytes - shorter.needed_bytes)[0]
        if (more := batch_of(shorter.resolved, cut, context)) > batch:
            notes = (*notes, f"with --max-model-len {context} the largest batch is {more}: pages are divided for it")
    return replace(
        plan,
        notes=(*plan.notes, *notes),
        kv_cache_bytes=sum(pool.num_pages * pool.page_bytes for pool in layout.pools),
        max_model_len=length,
        largest_context=largest,
        kv_tokens=kv_tokens(layout),
        context=context,
        largest_batch=batch,
        floors=floors(plan, batch, context, length),
    )


def with_length(ask: Ask, length: int | None) -> Ask:
    """length: --max-model-len, None = not given."""
    return replace(ask, config=replace(ask.config, model=replace(ask.config.model, max_model_len=length)))


def batch_of(resolved: Resolved, layout: CacheLayout, context: int) -> int:
    """Requests of so many tokens whose pages are there at once, at most --max-num-seqs."""
    need = pages_of(resolved, context)
    held = min((pool.num_pages - 1) // pages for pool, pages in zip(layout.pools, need, strict=True))
    return min(held, resolved.max_num_seqs)


def kv_tokens(layout: CacheLayout) -> int:
    """Tokens in the pages of the groups that see everything; of all groups where each has a window."""
    groups = [group for group in layout.groups if group.spec.kind is GroupKind.FULL] or list(layout.groups)
    sharing = {pool: [group for group in groups if group.pool == pool] for pool in {group.pool for group in groups}}
    return min(
        (layout.pools[pool].num_pages - 1) // len(members) * members[0].page_tokens for pool, members in sharing.items()
    )


def floors(plan: Plan, batch: int, context: int, length: int) -> tuple[Floor, ...]:
    runner = plan.resolved.runner
    chip = plan.ask.slice.chip
    model = Model(
        arch=plan.arch,
        ranks=plan.ranks,
        slice=plan.ask.slice,
        sizes=weight_sizes(plan.arch, plan.ranks, runner.dtype, chip.kind),
        dtype=runner.dtype,
        kv_dtype=runner.kv_dtype,
    )
    return (
        decode_floor(model, 1, context),
        decode_floor(model, max(1, batch), context),
        prefill_floor(model, plan.resolved.max_num_batched_tokens, length),
    )
