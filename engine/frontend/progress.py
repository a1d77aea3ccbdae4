"""Progress bars on stderr: start-up phases, and generation with tokens per second. Silent where stderr is no
terminal.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from engine.core.messages import StartupProgress

MIB = 1 << 20


def is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


class NoBar:
    """Counts nothing, shows nothing."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, finished: int, prompt_tokens: int, output_tokens: int) -> None: ...


class GenerationBar:
    """Requests done, and input and output tokens a second."""

    def __init__(self, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rate]}"),
            console=Console(stderr=True),
            disable=not is_terminal(),
        )
        self._task: TaskID = self._progress.add_task("Requests", total=total, rate="")
        self._begun = time.monotonic()
        self._prompt = self._output = 0

    def __enter__(self) -> GenerationBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, finished: int, prompt_tokens: int, output_tokens: int) -> None:
        self._prompt += prompt_tokens
        self._output += output_tokens
        seconds = max(1e-6, time.monotonic() - self._begun)
        rate = f"in {self._prompt / seconds:,.0f} tok/s  out {self._output / seconds:,.0f} tok/s"
        self._progress.update(self._task, advance=finished, rate=rate)


class StartupBar:
    """One line a phase of the core's start."""

    def __init__(self, shown: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not (shown and is_terminal()),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StartupBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, event: StartupProgress) -> None:
        task = self._tasks.get(event.phase)
        if task is None:
            task = self._tasks[event.phase] = self._progress.add_task(event.phase, total=event.total, amount="")
        in_bytes = event.phase == "weights" and event.total > MIB
        amount = (
            f"{event.done / MIB:,.0f} / {event.total / MIB:,.0f} MiB" if in_bytes else f"{event.done} / {event.total}"
        )
        self._progress.update(task, completed=event.done, total=event.total, amount=amount)
