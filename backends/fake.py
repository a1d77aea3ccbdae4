"""A runner without a framework: deterministic, quick, and strict. It drives every test of the engine.

`Runner` has every part of engine/runner.py and every Capability of steps. It keeps real page tables and pages in numpy,
reads every token that a row attends through them, and makes logits from a hash of what it read: a wrong page, slot,
length or order changes the output or, where it can be told, raises InternalError at once. Rules: docs/contract.md.

Always true: plans run in the order of submission; a plan's effect does not depend on when it is collected.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from backends.fake_checks import check_plans, fingerprint
from backends.fake_device import Bool, Device, Forward
from backends.fake_model import FakeOptions, unpack_mask
from backends.fake_pages import PageContent
from backends.fake_transfers import TransferQueue
from engine.errors import InternalError, StepFailed, check, fail
from engine.runner import Capability, DeviceInfo, Placement, Progress, RunnerConfig
from engine.specs.cache import CacheLayout, GroupKind
from engine.step import I32, U32, Event, StepPlan, StepResult

__all__ = ["FakeOptions", "Runner"]

LIFE = ("new", "configured", "loaded", "allocated", "ready", "shut down")


@dataclass(frozen=True, slots=True, eq=False)
class Handle:
    """Opaque to the engine; equal only to itself."""

    step_id: int


@dataclass(slots=True, eq=False)
class Pending:
    """A step between submit and collect."""

    handle: Handle
    plans: tuple[StepPlan, ...]
    fingerprints: tuple[int, ...]
    earlier: tuple[Pending, ...]  # steps not collected when this one was submitted
    last_collected: int
    ready_at: float
    forwards: list[Forward] = field(default_factory=list)
    masks: list[Bool] | None = None
    results: list[StepResult] | None = None
    failure: StepFailed | None = None

    @property
    def late(self) -> bool:
        return any(plan.late_mask for plan in self.plans)

    @property
    def ended(self) -> bool:
        return self.results is not None or self.failure is not None


class Runner:
    """The fake runner. Keyword arguments are the fields of FakeOptions.

    remote: page contents by connector handle, the other side of transfers; may be shared between runners.
    """

    def __init__(self, remote: dict[str, PageContent] | None = None, **options: Any) -> None:
        self.options = FakeOptions(**options)
        self.remote = {} if remote is None else remote
        self._life = "new"
        self._queue: list[Pending] = []
        self._devices: list[Device] = []
        self._transfers: list[TransferQueue] = []
        self._ended: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # transfers ended, not yet told; per replica
        self._last_submitted = self._last_collected = -1
        self._compiles = 0
        self._draining = False  # a failure was collected, steps behind it were not

    # life

    def describe(self, device: str = "auto") -> DeviceInfo:
        options = self.options
        return DeviceInfo(
            kind="fake",
            name="fake",
            memory_bytes=options.memory_bytes,
            free_bytes=options.memory_bytes,
            capabilities=options.capabilities,
            max_in_flight=options.max_in_flight,
            page_tokens=options.page_tokens,
            quantization=("fp8", "compressed-tensors", "awq", "gptq"),  # it has no weights at all
            bucket_style=options.bucket_style,
        )

    def configure(self, config: RunnerConfig, place: Placement) -> None:
        self._enter("new", "configured")
        check(
            config.num_replicas == 1 or Capability.REPLICAS in self.options.capabilities, "replicas were not announced"
        )
        check(1 <= config.max_in_flight <= self.options.max_in_flight, f"max_in_flight {config.max_in_flight}")
        for name, sizes in (("token_buckets", config.token_buckets), ("row_buckets", config.row_buckets)):
            check(list(sizes) == sorted(set(sizes)), f"{name} {sizes} do not ascend")
        self._config = config

    def load(self, checkpoint: Path | None, progress: Progress | None = None) -> None:
        """There are no weights: the model is a hash, seeded by RunnerConfig.seed."""
        self._enter("configured", "loaded")
        if progress is not None:
            progress("weights", 1, 1)

    def memory_plan(self, config: RunnerConfig) -> dict[str, int]:
        return {}

    def memory_peak(self) -> int:
        return 0

    def cache_budget_bytes(self) -> int:
        check(self._life == "loaded", f"cache_budget_bytes is asked of a runner that is {self._life}")
        return self.options.memory_bytes

    def allocate_cache(self, layout: CacheLayout) -> None:
        self._enter("loaded", "allocated")
        check(len(layout.groups) == len(self._config.page_tokens), "one page size for each group")
        chunked = any(group.spec.kind is GroupKind.CHUNKED for group in layout.groups)
        check(not chunked, "chunked groups: not in this runner yet")
        self._layout = layout
        for _ in range(self._config.num_replicas):
            device = Device(self._config, layout, self.options)
            self._devices.append(device)
            turns, failing = self.options.transfer_turns, self.options.fail_transfers
            self._transfers.append(TransferQueue(device.pools, self.remote, turns, failing))
            self._ended.append(((), ()))

    def warm_up(self, progress: Progress | None = None) -> None:
        self._enter("allocated", "ready")
        programs = len(self._config.token_buckets) + 2 * len(self._config.row_buckets)
        for done in range(programs):
            self._compiles += 1
            if progress is not None:
                progress("warm_up", done + 1, programs)

    def num_compiles(self) -> int:
        return self._compiles

    def shutdown(self) -> None:
        self._life = "shut down"
        self._queue.clear()

    def _enter(self, before: str, after: str) -> None:
        check(self._life == before, f"the runner is {self._life}; expected {before}, to become {after}")
        self._life = after

    # steps

    def submit(self, plans: Sequence[StepPlan]) -> Handle:
        check(self._life == "ready", f"submit to a runner that is {self._life}")
        failed = any(step.failure is not None for step in self._queue)
        check(not (self._draining and failed), "a step failed: collect those behind it before submitting another")
        check(len(self._queue) < self._config.max_in_flight, f"{len(self._queue)} steps are in flight already")
        check_plans(plans, self._config, self._layout, self.options.capabilities)
        step_id = plans[0].step_id
        check(step_id > self._last_submitted, f"step {step_id} after step {self._last_submitted}")
        begin = max(time.monotonic(), self._queue[-1].ready_at if self._queue else 0.0)
        step = Pending(
            handle=Handle(step_id),
            plans=tuple(plans),
            fingerprints=tuple(fingerprint(plan) for plan in plans),
            earlier=tuple(self._queue),
            last_collected=self._last_collected,
            ready_at=begin + self.options.latency_s,
        )
        self._queue.append(step)
        self._last_submitted = step_id
        try:
            self._advance()
        except InternalError:
            self._queue.remove(step)  # a plan that breaks the contract was not taken
            raise
        return step.handle

    def provide_mask(self, handle: Handle, rows: I32, bits: U32) -> None:
        """Rows are numbered over all plans of the step, replica after replica."""
        step = self._find(handle)
        check(step.late, f"step {handle.step_id} was not submitted with a late mask")
        check(step.masks is None, f"step {handle.step_id} has its mask already")
        total = sum(plan.num_rows for plan in step.plans)
        check(len(rows) == len(bits) == len(np.unique(rows)), "a mask for each row, once")
        check(not len(rows) or (rows.min() >= 0 and rows.max() < total), f"mask rows {rows.tolist()} of {total}")
        mask = np.ones((total, self._config.arch.vocab_size), np.bool_)
        mask[rows] = unpack_mask(bits, self._config.arch.vocab_size)
        starts = np.cumsum([plan.num_rows for plan in step.plans])[:-1]
        step.masks = np.split(mask, starts)
        self._advance()

    def collect(self, handle: Handle) -> Sequence[StepResult]:
        step = self._find(handle)
        check(step is self._queue[0], f"step {handle.step_id} is collected before step {self._queue[0].handle.step_id}")
        check(step.ended or not step.late or step.masks is not None, f"step {handle.step_id} waits for its mask")
        time.sleep(max(0.0, step.ready_at - time.monotonic()))
        self._advance()
        self._check_unchanged(step)
        self._queue.pop(0)
        self._last_collected = step.handle.step_id
        self._draining = bool(self._queue) and (self._draining or step.failure is not None)
        if step.failure is not None:
            raise step.failure
        check(step.results is not None, f"step {handle.step_id} has not run")
        return step.results or ()

    def poll(self) -> list[Event]:
        """Transfers that ended while no step ran."""
        events: list[Event] = []
        for replica in range(len(self._devices)):
            finished, failed = self._end_transfers(replica)
            events += [Event(kind="transfer_finished", transfer_id=i) for i in finished]
            events += [Event(kind="transfer_failed", transfer_id=i, detail="no such pages remotely") for i in failed]
        return events

    def _find(self, handle: Handle) -> Pending:
        for step in self._queue:
            if step.handle is handle:
                return step
        fail(f"step {handle.step_id} is not in flight")

    def _check_unchanged(self, step: Pending) -> None:
        now = tuple(fingerprint(plan) for plan in step.plans)
        check(now == step.fingerprints, f"the plan of step {step.handle.step_id} was changed before it was collected")

    def _advance(self) -> None:
        """Run what can run, in order: a step that waits for its mask holds up the steps behind it."""
        for step in self._queue:
            if step.ended:
                continue
            if not step.forwards:
                self._begin(step)
            if step.failure is None:
                if step.late and step.masks is None:
                    return
                self._finish(step)

    def _begin(self, step: Pending) -> None:
        self._check_unchanged(step)
        inherited = next((s.failure for s in step.earlier if s.failure is not None), None)
        step.failure = self.options.fail_at.get(step.handle.step_id)
        if step.failure is None and inherited is not None:
            step.failure = StepFailed(
                "an earlier step failed while this one was in flight", cache_lost=inherited.cache_lost
            )
        for replica, (device, plan) in enumerate(zip(self._devices, step.plans, strict=True)):
            for pool in device.pools:
                pool.now = plan.step_id
            device.apply_tables(plan)
            if step.failure is not None:
                device.broken.update(plan.slots.tolist())
                self._lose(replica, step.failure)
                continue
            if plan.transfers is not None:
                self._transfers[replica].begin(plan.transfers, step.last_collected)
            step.forwards.append(device.forward(plan, self._slack(step, replica)))

    def _lose(self, replica: int, failure: StepFailed) -> None:
        if failure.cache_lost:
            for pool in self._devices[replica].pools:
                pool.clear()
            finished, failed = self._ended[replica]
            self._ended[replica] = finished, failed + self._transfers[replica].lose()

    def _finish(self, step: Pending) -> None:
        results = []
        for replica, (device, forward) in enumerate(zip(self._devices, step.forwards, strict=True)):
            mask = None if step.masks is None or not forward.plan.late_mask else step.masks[replica]
            result = device.finish(forward, mask)
            finished, failed = self._end_transfers(replica)
            results.append(replace(result, finished_transfers=finished, failed_transfers=failed))
        step.results = results

    def _end_transfers(self, replica: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        finished, failed = self._transfers[replica].turn()
        old_finished, old_failed = self._ended[replica]
        self._ended[replica] = (), ()
        return old_finished + finished, old_failed + failed

    def _slack(self, step: Pending, replica: int) -> I32 | None:
        """How many tokens a slot may be behind the plan: what steps uncollected at its submission could have added."""
        slack = None
        for before in step.earlier:
            plan = before.plans[replica]
            if before.results is None or (plan.drafts is None and plan.num_steps == 1):
                continue
            if slack is None:
                slack = np.zeros(self._config.max_slots, np.int32)
            most = plan.num_steps if plan.drafts is None else 1 + plan.drafts.num_drafts
            slack[plan.slots] += most - before.results[replica].num_sampled
        return slack
