"""Where a start's time goes: named spans from the start of this process to ready, one after another, without gaps.

Used by engine/core/start.py; the spans go to the client in CoreReady and to the log as one table. A runner names parts
of its own by `progress`: the call that ends a phase (done = total) ends a span of that name.
Always true: the spans add up to the time since the process began.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from engine.runner import Progress

STAT = Path("/proc/self/stat")
START_TIME = 19  # of the fields behind the program's name, in clock ticks since the machine came up


class Timeline:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic() - process_age_s()

    def done(self, name: str) -> None:
        """End the running span under this name; a name that comes again adds to its span."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def watch(self, progress: Progress | None) -> Progress:
        """`progress`, and spans from it."""

        def report(phase: str, done: int, total: int) -> None:
            if done == total:
                self.done(phase)
            if progress is not None:
                progress(phase, done, total)

        return report

    def table(self) -> str:
        return "ready, seconds since the process began\n" + table(self.seconds)


def table(seconds: dict[str, float]) -> str:
    """Spans as lines, with their shares of the whole."""
    whole = sum(seconds.values())
    width = max(map(len, (*seconds, "together")))
    shares = {**seconds, "together": whole}
    return "\n".join(
        f"  {name:{width}}  {span:7.2f} s  {span / max(whole, 1e-9):6.1%}" for name, span in shares.items()
    )


def process_age_s() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    if not STAT.exists():
        return 0.0
    fields = STAT.read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[START_TIME]) / ticks)
