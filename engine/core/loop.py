"""CoreLoop: messages in, steps through the scheduler and the executor, messages out. One step of overlap.

    turn:   schedule n + 1 -> submit n + 1 -> key units (the device works on n) -> collect n -> update n

`depth` is how many steps may be in flight; 1 is the plain loop. Driven by core/process.py or, in one process, by the
client itself. Always true: a message or a row that is at fault ends its own request; a failed step ends its culprits,
and the steps behind it are collected before anything new is submitted.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np

from engine.core.messages import (
    AbortRequests,
    AddRequest,
    FromCore,
    Ping,
    Reply,
    RequestFailed,
    ResetPrefixCache,
    Shutdown,
    ToCore,
)
from engine.core.outputs import encode_columns, scheduler_stats
from engine.core.requests import Requests, sequences
from engine.errors import RequestError, StepFailed, check
from engine.executor.base import Executor
from engine.runner import StepHandle
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.update import StepColumns
from engine.step import I64, StepPlan

NO_OUTPUTS = StepColumns(
    keys=np.zeros(0, np.int64),
    counts=np.zeros(0, np.int32),
    tokens=np.zeros(0, np.int32),
    finish=np.zeros(0, np.uint8),
    stop_token=np.zeros(0, np.int32),
    num_cached=np.zeros(0, np.int32),
)


class Loop:
    """Messages and turns; how a step is planned, submitted and taken in is a subclass's."""

    def __init__(self, requests: Requests, executor: Executor, depth: int) -> None:
        self._requests = requests
        self.executor = executor
        self.depth = depth
        self._open: deque[tuple[Any, StepHandle]] = deque()
        self._outbox: list[FromCore] = []
        self._started: list[tuple[I64, float]] = []  # keys that got a turn, and when; told with the next outputs
        self._told_busy = False  # the last figures told of requests

    @property
    def has_work(self) -> bool:
        return bool(self._requests.has_work or self._outbox)

    def handle(self, message: ToCore) -> None:
        """Take in a message. A request that is refused is answered by the next `step`."""
        match message:
            case AddRequest():
                try:
                    for request in sequences(message):
                        self._requests.add(request)
                except RequestError as error:
                    self._requests.abort(range(message.key, message.key + message.params.n))
                    self._outbox.append(RequestFailed(message.key, error.code, str(error)))
            case AbortRequests():
                self._requests.abort(message.keys)
            case ResetPrefixCache():
                self._requests.reset_prefix_cache()
                self._outbox.append(Reply(message.call, True))
            case Ping():
                self._outbox.append(Reply(message.call, True))
            case Shutdown():
                self.shutdown()

    def step(self) -> list[FromCore]:
        """One turn: plan and submit a step, then collect the oldest if the pipeline is full or nothing was planned."""
        planned = len(self._open) < self.depth and self._submit()
        self._requests.commit_keys()
        if self._open and (len(self._open) >= self.depth or not planned):
            self._collect()
        if self._told_busy and not self._requests.has_work:
            # the last requests ended without an output (aborted): what was told of them is no longer true
            self._tell(NO_OUTPUTS)
        out, self._outbox = self._outbox, []
        return out

    def shutdown(self) -> None:
        """Let the device finish what it has, then release it."""
        while self._open:
            self._collect()
        self.executor.shutdown()

    def _submit(self) -> bool:
        """Plan and submit a step; False where nothing can be planned."""
        raise NotImplementedError

    def _collect(self) -> None:
        """Take in the oldest step, and those behind it where it failed."""
        raise NotImplementedError

    def _mark_started(self, keys: I64) -> None:
        self._started.append((keys, time.monotonic()))

    def _tell(self, columns: StepColumns) -> None:
        """Outputs of a step, with the figures of now."""
        message = encode_columns(columns, scheduler_stats(self._requests.stats()))
        if self._started:
            message.started = np.concatenate([keys for keys, _ in self._started]).tobytes()
            message.started_s = np.repeat(
                [when for _, when in self._started], [len(keys) for keys, _ in self._started]
            ).tobytes()
            self._started.clear()
        self._told_busy = self._requests.has_work
        self._outbox.append(message)

    def _report_failures(self, detail: str) -> None:
        for failure in self._requests.take_failures():
            self._outbox.append(RequestFailed(failure.key, failure.code, failure.message + detail))


class CoreLoop(Loop):
    """One scheduler."""

    def __init__(self, scheduler: Scheduler, executor: Executor, depth: int) -> None:
        check(
            1 <= depth <= scheduler.config.max_in_flight, f"depth {depth} with {scheduler.config.max_in_flight} buffers"
        )
        super().__init__(scheduler, executor, depth)
        self.scheduler = scheduler

    def _submit(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        if plan.opened is not None:
            self._mark_started(self.scheduler.keys_of(plan.opened.slots))
        try:
            handle = self.executor.submit([plan])
        except StepFailed as error:
            # steps in flight stand before this one in the scheduler's order
            while self._open:
                self._collect()
            self._fail(plan, error)
            return False
        self._open.append((plan, handle))
        return True

    def _collect(self) -> None:
        plan, handle = self._open.popleft()
        try:
            (result,) = self.executor.collect(handle)
        except StepFailed as error:
            self._fail(plan, error)
            # what was submitted behind it has read what it should have written
            while self._open:
                self._collect()
            return
        columns = self.scheduler.update(plan, result)
        self._report_failures("")
        if columns is not None:
            self._tell(columns)

    def _fail(self, plan: StepPlan, error: StepFailed) -> None:
        self.scheduler.fail(plan, error)
        self._report_failures(f": {error}")
