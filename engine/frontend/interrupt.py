"""Ctrl-C between steps, never inside one: an interrupt in the middle of a step would leave the core half changed.

Used by LLM around its loop. Outside the main thread, and where the program has its own handler, nothing is touched.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class DeferredInterrupt:
    """While entered, the first Ctrl-C is kept until `check`; the second one interrupts at once, as always."""

    def __init__(self) -> None:
        self._seen = False
        self._armed = False

    def __enter__(self) -> DeferredInterrupt:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._on_interrupt)
            self._armed = True
        return self

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._seen:
            signal.default_int_handler(number, frame)
        self._seen = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C has come."""
        if self._seen:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._armed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
