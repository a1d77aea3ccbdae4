"""What the front end tells about its work: plain numbers, one object a step.

The front end (engine/frontend) fills an IterationStats while it handles one StepOutputs message and hands it to every
listener with the core's SchedulerStats. Listeners (engine/metrics/export.py, a log line, a test) never block and never
raise. Times are seconds of time.monotonic(). Nothing here holds text, a key or a client's id.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class SchedulerGauges(Protocol):
    """The part of core.messages.SchedulerStats that listeners read (metrics lie below core)."""

    num_running: int
    num_waiting: int
    kv_usage: float  # [0, 1]
    prefix_queries: int  # tokens looked up since the core started
    prefix_hits: int  # tokens found since the core started
    num_preemptions: int  # since the core started


@dataclass(slots=True, kw_only=True)
class FinishedRequest:
    """One user request (all of its n sequences) that has ended."""

    reason: str  # stop | length | abort | error
    num_prompt: int  # tokens
    num_generated: int  # tokens, all n sequences together
    n: int
    max_tokens: int | None
    e2e_s: float  # arrival to end
    queued_s: float | None = None  # arrival to first scheduled, None when the core did not say
    first_token_s: float | None = None  # arrival to first token, None when there was none

    @property
    def decode_s(self) -> float | None:
        """First token to end."""
        return None if self.first_token_s is None else self.e2e_s - self.first_token_s

    @property
    def prefill_s(self) -> float | None:
        """First scheduled to first token."""
        if self.first_token_s is None or self.queued_s is None:
            return None
        return self.first_token_s - self.queued_s

    @property
    def inference_s(self) -> float | None:
        """First scheduled to end."""
        return None if self.queued_s is None else self.e2e_s - self.queued_s

    @property
    def per_output_token_s(self) -> float | None:
        """Mean gap between one sequence's tokens after the first; None where there was only one."""
        later = self.num_generated // max(1, self.n) - 1
        return None if self.decode_s is None or later < 1 else self.decode_s / later


@dataclass(slots=True, kw_only=True)
class IterationStats:
    """What one step's outputs meant for the requests of this front end."""

    num_prompt: int = 0  # prompt tokens of requests that got their first token in this step
    num_generated: int = 0  # tokens generated in this step
    first_token_s: list[float] = field(default_factory=list)  # per first token: time since arrival
    inter_token_s: list[float] = field(default_factory=list)  # per later token: time since the one before it
    finished: list[FinishedRequest] = field(default_factory=list)


class StatsListener(Protocol):
    """Called by the front end once per step message, and once more for requests that end without one (aborts)."""

    def on_step(self, iteration: IterationStats, scheduler: SchedulerGauges | None) -> None: ...
