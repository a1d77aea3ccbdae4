"""The ASGI middleware that every request passes first: id, key, header limits, counters, and the last error handler.

Deny by default: with keys configured, every path but those of OPEN_PATHS needs one. Keys are held and compared as
SHA-256 digests, in constant time, all of them every time (R10).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Iterable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.entrypoints.disconnect import CLIENT_CLOSED, ClientLeft
from engine.entrypoints.http_errors import HttpError, describe
from engine.metrics.export import HttpMetrics

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})
MAX_HEADERS = 64
MAX_HEADER_BYTES = 32 << 10

log = logging.getLogger("twinfer.http")


def hash_keys(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def is_authorized(headers: Sequence[tuple[bytes, bytes]], digests: Sequence[bytes]) -> bool:
    """Whether exactly one Authorization header carries a bearer token that is one of the keys."""
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        return False
    scheme, _, token = values[0].partition(b" ")
    digest = hashlib.sha256(token.strip()).digest()
    found = False
    for known in digests:
        found |= hmac.compare_digest(digest, known)  # no early exit: the time tells nothing
    return found and scheme.lower() == b"bearer"


class Gate:
    """See the module's docstring. `digests` empty means: no keys needed."""

    def __init__(self, app: ASGIApp, digests: tuple[bytes, ...], metrics: HttpMetrics) -> None:
        self._app = app
        self._digests = digests
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":  # there are no such routes
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begun = time.monotonic()
        status = 0

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            refusal = self._refuse(scope)
            if refusal is not None:
                await answer(send_noting_status, refusal)
            else:
                await self._app(scope, receive, send_noting_status)
        except ClientLeft:
            status = status or CLIENT_CLOSED
        except Exception as error:
            log.error("request %s failed", request_id, exc_info=error)
            if status == 0:
                await answer(send_noting_status, describe(error, request_id))
        finally:
            route = getattr(scope.get("route"), "path", None)
            self._metrics.observe(route, scope["method"], status or CLIENT_CLOSED, time.monotonic() - begun)

    def _refuse(self, scope: Scope) -> HttpError | None:
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(n) + len(v) for n, v in headers) > MAX_HEADER_BYTES:
            return HttpError(431, f"more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes", "headers_too_large")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._digests or path in OPEN_PATHS or is_authorized(headers, self._digests):
            return None
        return HttpError(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")


async def answer(send: Send, error: HttpError) -> None:
    headers = [(b"content-type", b"application/json")]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    body = error.body()
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
