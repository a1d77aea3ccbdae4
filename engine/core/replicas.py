"""Data parallelism in one process: a scheduler and KV manager a replica, steps of all replicas submitted together.

A request belongs to one replica from admission to its end. Replicas share the step id and the padded sizes of a step
and nothing else; one that has nothing to do gets an empty plan. Built by core/start.py where --data-parallel-size is
more than 1, in place of CoreLoop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from engine.core.loop import Loop
from engine.errors import InvalidValue, StepFailed, check
from engine.executor.base import Executor
from engine.request import Request
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.stats import SchedulerGauges
from engine.scheduler.update import Failure
from engine.step import Bucket, StepPlan, empty_plan

HEAD_TOKENS = 64
"""Prompts that begin with the same so many tokens had better go to one replica: its prefix cache has them."""
MAX_HEADS = 4096  # beginnings that are remembered
NOBODY = (-1,)
"""Rows of a failed step for replicas that had no part in it: no row of theirs is at fault."""

Plans = tuple[StepPlan | None, ...]


class Replicas:
    """The schedulers together, as a loop asks them."""

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        check(len(schedulers) > 1, "replicas are at least two")
        self.schedulers = tuple(schedulers)
        self.num_steps = 0
        self._arrivals = 0
        self._chosen = [0] * len(self.schedulers)  # arrival that each replica got last
        self._heads: dict[bytes, int] = {}  # the beginning of a prompt -> its replica, the oldest first
        self._siblings = (-1, 0)  # parent key, replica

    @property
    def has_work(self) -> bool:
        return any(scheduler.has_work for scheduler in self.schedulers)

    def add(self, request: Request) -> None:
        """Queue a request in one replica. Raises InvalidValue, NeverFits or Overloaded; then nothing has changed."""
        for scheduler in self.schedulers:
            if request.key in scheduler.state.waiting or request.key in scheduler.state.slot_of:
                raise InvalidValue(f"key: {request.key} is in use", param="key")
        head = self._head(request)
        replica = self._choose(request, head)
        self.schedulers[replica].add(request)
        self._arrivals += 1
        self._chosen[replica] = self._arrivals
        if request.parent is not None:
            self._siblings = request.parent, replica
        if head:
            self._heads.pop(head, None)
            self._heads[head] = replica
            if len(self._heads) > MAX_HEADS:
                del self._heads[next(iter(self._heads))]

    def _head(self, request: Request) -> bytes:
        if request.num_prompt < HEAD_TOKENS:
            return b""
        return request.prompt[:HEAD_TOKENS].tobytes() + request.domain

    def _choose(self, request: Request, head: bytes) -> int:
        """The least loaded, or who has the prompt's beginning and is not much busier. Siblings share their prompt."""
        if request.parent is not None and request.parent == self._siblings[0]:
            return self._siblings[1]
        loads = [len(scheduler.state.slot_of) + len(scheduler.state.waiting) for scheduler in self.schedulers]
        least = min(loads)
        replica = self._heads.get(head)
        if replica is not None and loads[replica] <= least + 2 + least // 4:
            return replica
        return min(range(len(loads)), key=lambda replica: (loads[replica], self._chosen[replica]))

    def abort(self, keys: Iterable[int]) -> int:
        """End requests in any state, without output. -> how many of the keys were known."""
        wanted = list(keys)
        return sum(scheduler.abort(wanted) for scheduler in self.schedulers)

    def reset_prefix_cache(self) -> None:
        self._heads.clear()
        for scheduler in self.schedulers:
            scheduler.reset_prefix_cache()

    def commit_keys(self) -> None:
        for scheduler in self.schedulers:
            scheduler.commit_keys()

    def take_failures(self) -> list[Failure]:
        return [failure for scheduler in self.schedulers for failure in scheduler.take_failures()]

    def stats(self) -> SchedulerGauges:
        """Sums; the usage of the KV cache is the mean, since all have as many pages; steps are counted once."""
        gauges = [scheduler.stats() for scheduler in self.schedulers]
        return SchedulerGauges(
            num_running=sum(one.num_running for one in gauges),
            num_waiting=sum(one.num_waiting for one in gauges),
            kv_usage=sum(one.kv_usage for one in gauges) / len(gauges),
            prefix_queries=sum(one.prefix_queries for one in gauges),
            prefix_hits=sum(one.prefix_hits for one in gauges),
            num_preemptions=sum(one.num_preemptions for one in gauges),
            step=self.num_steps,
            num_recomputed=sum(one.num_recomputed for one in gauges),
        )

    def check_integrity(self) -> None:
        for scheduler in self.schedulers:
            scheduler.check_integrity()


class ReplicaLoop(Loop):
    """Turns of all replicas together."""

    def __init__(self, replicas: Replicas, executor: Executor, depth: int) -> None:
        super().__init__(replicas, executor, depth)
        self.replicas = replicas

    def _submit(self) -> bool:
        plans = self._plans()
        if all(plan is None for plan in plans):
            return False
        for scheduler, plan in zip(self.replicas.schedulers, plans, strict=True):
            if plan is not None and plan.opened is not None:
                self._mark_started(scheduler.keys_of(plan.opened.slots))
        self.replicas.num_steps += 1
        try:
            handle = self.executor.submit(aligned(plans, self.replicas.num_steps))
        except StepFailed as error:
            # steps in flight stand before this one in the schedulers' order
            while self._open:
                self._collect()
            self._fail(plans, error)
            return False
        self._open.append((plans, handle))
        return True

    def _plans(self) -> Plans:
        """A step has several turns where all replicas can take them: they are one program."""
        chosen = [scheduler.choose() for scheduler in self.replicas.schedulers]
        several = all(one.several for one in chosen)
        return tuple(
            scheduler.plan(one, several) for scheduler, one in zip(self.replicas.schedulers, chosen, strict=True)
        )

    def _collect(self) -> None:
        plans, handle = self._open.popleft()
        try:
            results = self.executor.collect(handle)
        except StepFailed as error:
            self._fail(plans, error)
            # what was submitted behind it has read what it should have written
            while self._open:
                self._collect()
            return
        for scheduler, plan, result in zip(self.replicas.schedulers, plans, results, strict=True):
            columns = None if plan is None else scheduler.update(plan, result)
            self._report_failures("")
            if columns is not None:
                self._tell(columns)

    def _fail(self, plans: Plans, error: StepFailed) -> None:
        """A step is lost for all replicas. Rows at fault are counted over all plans, one after another."""
        first = 0
        for scheduler, plan in zip(self.replicas.schedulers, plans, strict=True):
            count = 0 if plan is None else plan.num_rows
            rows = tuple(row - first for row in error.rows if first <= row < first + count)
            first += count
            named = rows or (NOBODY if error.rows else ())
            if plan is not None or error.cache_lost:
                scheduler.fail(plan, StepFailed(str(error), rows=named, cache_lost=error.cache_lost))
        self._report_failures(f": {error}")


def aligned(plans: Plans, step_id: int) -> list[StepPlan]:
    """One plan a replica, with one step id and the largest padded sizes."""
    buckets = [plan.bucket for plan in plans if plan is not None]
    sizes = np.array([(bucket.tokens, bucket.rows) for bucket in buckets]).max(axis=0)
    bucket = Bucket(tokens=int(sizes[0]), rows=int(sizes[1]))
    return [
        empty_plan(step_id, bucket) if plan is None else replace(plan, step_id=step_id, bucket=bucket) for plan in plans
    ]
