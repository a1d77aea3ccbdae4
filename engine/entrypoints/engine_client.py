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


class ChatMessages(Protocol):
    """How messages become a prompt (openai.requests.TemplateOptions)."""

    @property
    def add_generation_prompt(self) -> bool: ...
    @property
    def continue_final_message(self) -> bool: ...
    @property
    def kwargs(self) -> Mapping[str, Any]: ...


class Texts(Protocol):
    """Text to tokens and back. Called in worker threads as well: implementations are thread-safe."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def encode_chat(
        self, messages: list[dict[str, Any]], template: ChatMessages, add_special_tokens: bool
    ) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...
    def token_strings(self, token_ids: Sequence[int]) -> list[str]: ...


class ServingEngine(Protocol):
    """The engine as the routes see it."""

    @property
    def texts(self) -> Texts: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def default_sampling(self) -> Mapping[str, Any]: ...
    @property
    def is_alive(self) -> bool: ...
    def generate(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, priority: int, cache_salt: str | None
    ) -> AsyncIterator[Output]: ...
    async def abort(self, request_id: str) -> None: ...
    async def ping(self) -> bool:
        """A round trip through the engine's loop. Raises EngineDead."""
