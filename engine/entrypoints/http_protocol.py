"""uvicorn's HTTP/1.1 protocol with what it lacks against hostile clients: a limit and a deadline for request heads.

httptools keeps a head of any length in memory and waits for its end for ever. Here a connection that sent more than
MAX_HEAD_BYTES without completing a head is answered 431, and one that does not complete a head in time is closed.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.entrypoints.http_errors import HttpError

MAX_HEAD_BYTES = 64 << 10


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `head_timeout_s` is set by a subclass that `bounded_protocol` makes."""

    head_timeout_s = 30.0
    _head_bytes: int | None = 0  # received since the last complete head; None while a body is read
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_bytes == 0 and self._deadline is None:
            self._expect_head()  # a later request of a kept connection
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        self._cancel_deadline()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._head_bytes = 0  # its deadline begins with its first byte: until then the keep-alive timer runs
        super().on_message_complete()

    def _expect_head(self) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self) -> None:
        body = HttpError(431, f"the request's head is longer than {MAX_HEAD_BYTES} bytes", "headers_too_large").body()
        head = "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


def bounded_protocol(head_timeout_s: float) -> type[BoundedProtocol]:
    """The protocol class with this deadline; uvicorn wants a class, not an instance."""
    return type("ConfiguredProtocol", (BoundedProtocol,), {"head_timeout_s": head_timeout_s})
