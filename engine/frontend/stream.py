"""RequestStream: what a reader of one request holds. Reading it late costs nothing but the tokens that wait (F-4)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.frontend.output import RequestState
from engine.frontend.results import RequestOutput
from engine.params import RequestOutputKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderLimits:
    """When a reader of a DELTA stream is given up: more than this unread, for this long."""

    max_unread_bytes: int = 256 << 10
    slow_reader_s: float = 30.0


class RequestStream:
    """Outputs of one request; an async iterator. Leaving it, by any way, aborts what has not finished."""

    def __init__(self, state: RequestState, leave: Callable[[RequestStream], None]) -> None:
        """leave: told when nobody reads any more; may be told twice."""
        self._leave = leave
        self._state = state
        self._news = asyncio.Event()
        self._unread_since: float | None = None  # over the limit since then

    @property
    def state(self) -> RequestState:
        return self._state

    def wake(self) -> None:
        """There is something to take."""
        self._news.set()

    def is_too_slow(self, limits: ReaderLimits) -> bool:
        """Whether more than the limit has been unread for longer than the limit."""
        if self._state.kind is not RequestOutputKind.DELTA or self._state.unread_bytes <= limits.max_unread_bytes:
            return False
        now = time.monotonic()
        if self._unread_since is None:
            self._unread_since = now
        return now - self._unread_since > limits.slow_reader_s

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output: all that is new since the last one. Raises EngineDead, RequestError."""
        try:
            while True:
                output = self._state.take()
                if output is not None:
                    self._unread_since = None
                    return output
                if self._state.finished:
                    raise StopAsyncIteration
                self._news.clear()
                await self._news.wait()
        except BaseException:
            self._leave(self)
            raise

    async def aclose(self) -> None:
        self._leave(self)

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave(self)
