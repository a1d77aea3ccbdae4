"""CoreLoop: messages in, steps through the scheduler and the executor, messages out. One step of overlap.

    turn:   schedule n + 1 -> submit n + 1 -> key units (the device works on n) -> collect n -> update n

`depth` is how many steps may be in flight; 1 is the plain loop. Driven by core/process.py or, in one process, by the
client itself. Always true: a message or a row that is at fault ends its own request; a failed step ends its culprits,
and the steps behind it are collected before anything new is submitted.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from dataclasses import replace

import numpy as np

from engine.core.messages import (
    AbortRequests,
    AddRequest,
    FromCore,
    LogprobColumns,
    Ping,
    Reply,
    RequestFailed,
    ResetPrefixCache,
    SchedulerStats,
    Shutdown,
    StepOutputs,
    ToCore,
)
from engine.errors import InvalidValue, RequestError, StepFailed, check
from engine.executor.base import Executor
from engine.request import Request
from engine.runner import StepHandle
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.stats import SchedulerGauges
from engine.scheduler.update import StepColumns
from engine.step import I64, Logprobs, StepPlan

SEED_MASK = (1 << 64) - 1


NO_OUTPUTS = StepColumns(
    keys=np.zeros(0, np.int64),
    counts=np.zeros(0, np.int32),
    tokens=np.zeros(0, np.int32),
    finish=np.zeros(0, np.uint8),
    stop_token=np.zeros(0, np.int32),
    num_cached=np.zeros(0, np.int32),
)


class CoreLoop:
    def __init__(self, scheduler: Scheduler, executor: Executor, depth: int) -> None:
        check(
            1 <= depth <= scheduler.config.max_in_flight, f"depth {depth} with {scheduler.config.max_in_flight} buffers"
        )
        self.scheduler = scheduler
        self.executor = executor
        self.depth = depth
        self._open: deque[tuple[StepPlan, StepHandle]] = deque()
        self._outbox: list[FromCore] = []
        self._started: list[tuple[I64, float]] = []  # keys that got a turn, and when; told with the next outputs
        self._told_busy = False  # the last figures told of requests

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.has_work or self._outbox)

    def handle(self, message: ToCore) -> None:
        """Take in a message. A request that is refused is answered by the next `step`."""
        match message:
            case AddRequest():
                try:
                    for request in sequences(message):
                        self.scheduler.add(request)
                except RequestError as error:
                    self.scheduler.abort(range(message.key, message.key + message.params.n))
                    self._outbox.append(RequestFailed(message.key, error.code, str(error)))
            case AbortRequests():
                self.scheduler.abort(message.keys)
            case ResetPrefixCache():
                self.scheduler.reset_prefix_cache()
                self._outbox.append(Reply(message.call, True))
            case Ping():
                self._outbox.append(Reply(message.call, True))
            case Shutdown():
                self.shutdown()

    def step(self) -> list[FromCore]:
        """One turn: plan and submit a step, then collect the oldest if the pipeline is full or nothing was planned."""
        planned = len(self._open) < self.depth and self._submit()
        self.scheduler.commit_keys()
        if self._open and (len(self._open) >= self.depth or not planned):
            self._collect()
        if self._told_busy and not self.scheduler.has_work:
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
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        if plan.opened is not None:
            self._started.append((self.scheduler.keys_of(plan.opened.slots), time.monotonic()))
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

    def _tell(self, columns: StepColumns) -> None:
        """Outputs of a step, with the figures of now."""
        message = encode_columns(columns, scheduler_stats(self.scheduler.stats()))
        if self._started:
            message.started = np.concatenate([keys for keys, _ in self._started]).tobytes()
            message.started_s = np.repeat(
                [when for _, when in self._started], [len(keys) for keys, _ in self._started]
            ).tobytes()
            self._started.clear()
        self._told_busy = self.scheduler.has_work
        self._outbox.append(message)

    def _fail(self, plan: StepPlan, error: StepFailed) -> None:
        self.scheduler.fail(plan, error)
        self._report_failures(f": {error}")

    def _report_failures(self, detail: str) -> None:
        for failure in self.scheduler.take_failures():
            self._outbox.append(RequestFailed(failure.key, failure.code, failure.message + detail))


def scheduler_stats(gauges: SchedulerGauges) -> SchedulerStats:
    return SchedulerStats(
        num_running=gauges.num_running,
        num_waiting=gauges.num_waiting,
        kv_usage=gauges.kv_usage,
        prefix_queries=gauges.prefix_queries,
        prefix_hits=gauges.prefix_hits,
        num_preemptions=gauges.num_preemptions,
        step=gauges.step,
    )


def sequences(message: AddRequest) -> list[Request]:
    """The n sequences of a request: keys key, key + 1, ...; seeds seed, seed + 1, ... Raises InvalidValue."""
    if len(message.prompt) % 4:
        raise InvalidValue(f"prompt: {len(message.prompt)} bytes are not whole 32-bit ids", param="prompt")
    prompt = np.frombuffer(message.prompt, "<i4").astype(np.int32, copy=False)
    params = message.params
    seed = secrets.randbits(64) if params.seed is None else params.seed & SEED_MASK
    first = Request(
        key=message.key,
        prompt=prompt,
        params=params,
        stop_ids=tuple(message.stop_ids),
        eos_ids=tuple(message.eos_ids),
        bad_word_ids=tuple(tuple(word) for word in message.bad_word_ids),
        seed=seed,
        priority=message.priority,
        domain=message.domain,
        parent=message.key if params.n > 1 else None,
    )
    if params.n == 1:
        return [first]
    # the prompt's logprobs are the same for all: the first sequence brings them
    others = replace(params, prompt_logprobs=None)
    return [first] + [
        replace(first, key=message.key + i, seed=(seed + i) & SEED_MASK, params=others, outputs=[])
        for i in range(1, params.n)
    ]


def encode_columns(columns: StepColumns, stats: SchedulerStats) -> StepOutputs:
    """Arrays to raw bytes; nothing is looked at one by one."""
    return StepOutputs(
        keys=columns.keys.tobytes(),
        counts=columns.counts.tobytes(),
        tokens=columns.tokens.tobytes(),
        finish=columns.finish.tobytes(),
        stop_token=columns.stop_token.tobytes(),
        num_cached=columns.num_cached.tobytes(),
        logprobs=None if columns.logprobs is None else encode_logprobs(columns.logprobs),
        prompt_logprobs={key: encode_logprobs(value) for key, value in columns.prompt_logprobs.items()} or None,
        stats=stats,
    )


def encode_logprobs(logprobs: Logprobs) -> LogprobColumns:
    return LogprobColumns(
        chosen=logprobs.chosen.tobytes(),
        rank=logprobs.rank.tobytes(),
        top_ids=logprobs.top_ids.tobytes(),
        top=logprobs.top.tobytes(),
        k=logprobs.top_ids.shape[1],
    )
