"""What a client and a core process drive, and how it is built: CoreLoop in earnest, a small stand-in in tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from engine.config import EngineConfig
from engine.core.messages import CoreReady, FromCore, ToCore
from engine.runner import Progress


class Core(Protocol):
    """Takes messages, gives messages."""

    @property
    def has_work(self) -> bool: ...

    def handle(self, message: ToCore) -> None:
        """Take in a message. Raises RequestError for a request that is refused."""

    def step(self) -> list[FromCore]: ...

    def shutdown(self) -> None: ...


BuildCore = Callable[[EngineConfig, Path, Progress], tuple[Core, CoreReady]]


def build_core(config: EngineConfig, model_path: Path, progress: Progress) -> tuple[Core, CoreReady]:
    """The real thing. Raises StartupError."""
    # imported here: whoever only talks to a core in another process has no use for scheduler and runners, and in that
    # process an import that fails is told to the client
    from engine.core.start import start_core

    return start_core(config, model_path, progress)
