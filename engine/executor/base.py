"""Executor: hands every plan to every runner of a replica and gives back the results of the one that answers.

The core loop knows only this protocol. `SameProcess` drives one runner in this process; executor/multiprocess.py will
drive one process per rank with the same plans in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.runner import ModelRunner, StepHandle
from engine.step import I32, U32, Event, StepPlan, StepResult


class Executor(Protocol):
    def submit(self, plans: Sequence[StepPlan]) -> StepHandle: ...

    def provide_mask(self, handle: StepHandle, rows: I32, bits: U32) -> None: ...

    def collect(self, handle: StepHandle) -> Sequence[StepResult]: ...

    def poll(self) -> list[Event]: ...

    def shutdown(self) -> None: ...


class SameProcess:
    """One runner, called directly."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def submit(self, plans: Sequence[StepPlan]) -> StepHandle:
        return self._runner.submit(plans)

    def provide_mask(self, handle: StepHandle, rows: I32, bits: U32) -> None:
        self._runner.provide_mask(handle, rows, bits)

    def collect(self, handle: StepHandle) -> Sequence[StepResult]:
        return self._runner.collect(handle)

    def poll(self) -> list[Event]:
        return self._runner.poll()

    def shutdown(self) -> None:
        self._runner.shutdown()
