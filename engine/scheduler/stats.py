"""What the scheduler counts, and what it tells of it. Read by the core loop, metrics and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerGauges:
    """Gauges, and counters since the start."""

    num_running: int
    num_waiting: int
    kv_usage: float  # [0, 1]
    prefix_queries: int  # tokens looked up
    prefix_hits: int  # tokens found
    num_preemptions: int
    step: int
    num_recomputed: int  # tokens computed again after a preemption


@dataclass(slots=True)
class Counters:
    arrivals: int = 0
    steps: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    recomputed: int = 0
