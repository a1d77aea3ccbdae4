"""A log line about throughput and cache use every few seconds while there is work: the StatsListener of --log-stats."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from engine.metrics.stats import IterationStats, SchedulerGauges

INTERVAL_S = 10.0

log = logging.getLogger("twinfer.stats")


class StatsLog:
    """Sums up IterationStats and logs them. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._prompt = 0
        self._generated = 0
        self._gauges: SchedulerGauges | None = None

    def on_step(self, iteration: IterationStats, scheduler: SchedulerGauges | None) -> None:
        self._prompt += iteration.num_prompt
        self._generated += iteration.num_generated
        if scheduler is not None:
            self._gauges = scheduler
        elapsed = self._clock() - self._since
        if elapsed >= INTERVAL_S:
            self._write(elapsed)

    def _write(self, elapsed: float) -> None:
        gauges = self._gauges
        line = f"prompt {self._prompt / elapsed:.1f} tokens/s, generation {self._generated / elapsed:.1f} tokens/s"
        if gauges is not None:
            hits = gauges.prefix_hits / max(1, gauges.prefix_queries)
            line += (
                f", running {gauges.num_running}, waiting {gauges.num_waiting}, "
                f"KV cache {gauges.kv_usage:.1%}, prefix hits {hits:.1%}"
            )
        log.info(line)
        self._since, self._prompt, self._generated = self._clock(), 0, 0
