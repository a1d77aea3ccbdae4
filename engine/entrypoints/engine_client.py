"""What the HTTP layer asks of an engine: the shape of AsyncEngine and of its outputs, and nothing else.

engine/frontend's AsyncEngine, RequestOutput, CompletionOutput and Logprob fit these protocols as they are; tests drive
the app with a small engine of their own. Field names are vLLM's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from engine.params import SamplingParams


class TokenLogprob(Protocol):
    @property
    def logprob(self) -> float: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def decoded_token(self) -> str | None: ...


PositionLogprobs = Mapping[int, TokenLogprob]  # token id -> logprob: the chosen one and the most likely ones


class Completion(Protocol):
    """One of the n sequences of an output; text, token_ids and logprobs are new ones only in a DELTA stream."""

    @property
    def index(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[PositionLogprobs] | None: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def stop_reason(self) -> int | str | None: ...


class Output(Protocol):
    @property
    def prompt_token_ids(self) -> Sequence[int] | None: ...
    @property
    def prompt_logprobs(self) -> Sequence[PositionLogprobs | None] | None: ...
    @property
    def outputs(self) -> Sequence[Completion]: ...
    @property
    def finished(self) -> bool: ...
    @property
    def num_cached_tokens(self) -> int | None: ...
