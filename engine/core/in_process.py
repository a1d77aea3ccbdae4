"""InProcessClient: a CoreClient whose core runs in this process and thread. For offline use."""

from __future__ import annotations

import time
from pathlib import Path

from engine.config import EngineConfig
from engine.core.build import BuildCore, Core, build_core
from engine.core.client import OnProgress
from engine.core.messages import CoreReady, FromCore, RequestFailed, Shutdown, StartupProgress, ToCore
from engine.errors import EngineDead, RequestError, check


class InProcessClient:
    """The core in this process and thread: `receive` runs steps. For offline use; not thread-safe."""

    def __init__(self, build: BuildCore = build_core) -> None:
        self._build = build
        self._core: Core | None = None
        self._refused: list[FromCore] = []

    def start(self, config: EngineConfig, model_path: Path, progress: OnProgress | None = None) -> CoreReady:
        def report(phase: str, done: int, total: int) -> None:
            if progress is not None:
                progress(StartupProgress(phase, done, total))

        self._core, ready = self._build(config, model_path, report)
        return ready

    def _running(self) -> Core:
        if self._core is None:
            raise EngineDead("the engine is closed")
        return self._core

    def send(self, message: ToCore) -> None:
        core = self._running()
        if isinstance(message, Shutdown):
            self.close()
            return
        try:
            core.handle(message)
        except RequestError as error:
            key = getattr(message, "key", None)
            check(key is not None, "only AddRequest may be refused")
            self._refused.append(RequestFailed(int(key or 0), error.code, str(error)))

    def receive(self, timeout_s: float | None) -> list[FromCore]:
        """Run steps until one gives messages, the core is idle, or `timeout_s` has passed (0: one step)."""
        core = self._running()
        messages, self._refused = self._refused, []
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not messages:
            messages = core.step()
            if not core.has_work or (deadline is not None and time.monotonic() >= deadline):
                break
        return messages

    def kill(self) -> None:
        self.close()

    def close(self) -> None:
        core, self._core = self._core, None
        if core is not None:
            core.shutdown()
