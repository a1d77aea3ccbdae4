"""The public face of twinfer: `from twinfer import LLM, SamplingParams`; `python -m twinfer` is the command line.

Names are loaded when they are first used, so that `import twinfer` is fast and loads no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from engine.entrypoints.version import version

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.errors import EngineDead, RequestError, StartupError, TwinferError
    from engine.frontend.async_engine import AsyncEngine
    from engine.frontend.input import TextPrompt, TokensPrompt
    from engine.frontend.llm import LLM
    from engine.frontend.results import CompletionOutput, Logprob, RequestOutput
    from engine.params import RequestOutputKind, SamplingParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EngineConfig",
    "EngineDead",
    "Logprob",
    "RequestError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StartupError",
    "TextPrompt",
    "TokensPrompt",
    "TwinferError",
]

HOMES = {
    "LLM": "engine.frontend.llm",
    "AsyncEngine": "engine.frontend.async_engine",
    "CompletionOutput": "engine.frontend.results",
    "EngineConfig": "engine.config",
    "EngineDead": "engine.errors",
    "Logprob": "engine.frontend.results",
    "RequestError": "engine.errors",
    "RequestOutput": "engine.frontend.results",
    "RequestOutputKind": "engine.params",
    "SamplingParams": "engine.params",
    "StartupError": "engine.errors",
    "TextPrompt": "engine.frontend.input",
    "TokensPrompt": "engine.frontend.input",
    "TwinferError": "engine.errors",
}

__version__ = version()


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'twinfer' has no attribute {name!r}")
    value: object = getattr(import_module(HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])


if __name__ == "__main__":
    import sys

    from engine.entrypoints.cli import main

    sys.exit(main())
