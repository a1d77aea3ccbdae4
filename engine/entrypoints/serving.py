"""The state of one HTTP server, given to every route: engine, served names, counters, the drain switch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from engine.entrypoints.disconnect import ClientLeft
from engine.entrypoints.engine_client import ServingEngine
from engine.entrypoints.http_errors import Draining, ModelNotFound, TooLarge, TooSlow, describe
from engine.entrypoints.settings import ServerSettings
from engine.entrypoints.strict_json import parse_object
from engine.errors import EngineDead, Overloaded
from engine.metrics.export import HttpMetrics, MetricsPage

log = logging.getLogger("twinfer.http")


@dataclass(slots=True, kw_only=True)
class Serving:
    """Owned by one app. `active` counts generations in flight (also /load)."""

    engine: ServingEngine
    settings: ServerSettings
    model_names: tuple[str, ...]
    model_root: str
    http_metrics: HttpMetrics
    page: MetricsPage
    draining: bool = False  # readyz says 503
    closed: bool = False  # new generations are answered 503
    active: int = 0
    silent: bool = False  # the engine did not answer its last heartbeat in time
    started: float = field(default=0.0)

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"

    @property
    def state(self) -> str:
        """What /readyz says."""
        if not self.engine.is_alive:
            return "engine ended"
        if self.draining:
            return "draining"
        return "engine does not answer" if self.silent else "ready"

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises ModelNotFound naming the served models."""
        if name is None or name == "":
            return self.model_names[0]
        if name not in self.model_names:
            served = ", ".join(repr(n) for n in self.model_names)
            raise ModelNotFound(f"model: {name!r} is not served here; this server has {served}", param="model")
        return name

    def check_open(self) -> None:
        """Raises Draining or EngineDead when no generation can start."""
        if self.closed:
            raise Draining("the server is shutting down and takes no new requests")
        if not self.engine.is_alive:
            raise EngineDead("the engine has ended")

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Counts a generation as active. Raises Overloaded when there are too many."""
        if self.active >= self.settings.max_open_requests:
            raise Overloaded(f"{self.active} requests are open, as many as this server takes; try again later")
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    async def watch_engine(self) -> None:
        """Ask the engine for a sign of life again and again, until it ends. A stopped core makes readyz say so."""
        timeout = self.settings.heartbeat_timeout
        while True:
            answer = asyncio.ensure_future(self.engine.ping())
            done, _ = await asyncio.wait({answer}, timeout=timeout)
            self.silent = not done
            if not done:
                log.error("the engine did not answer for %g s", timeout)
                await asyncio.wait({answer})
            if answer.exception() is not None:  # EngineDead: is_alive tells it from now on
                return
            self.silent = False
            await asyncio.sleep(timeout / 4)

    async def read_json(self, request: Request) -> dict[str, Any]:
        """The body as an object, within the limits of size, time and shape. Raises RequestError."""
        body = await self.read_body(request)
        if len(body) > 1 << 18:  # parsing this much would hold up every stream
            return await asyncio.to_thread(parse_object, body)
        return parse_object(body)

    async def read_body(self, request: Request) -> bytes:
        limit = self.settings.max_body_bytes
        too_large = TooLarge(f"the body is larger than {limit} bytes")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise TooSlow(f"the body did not arrive within {self.settings.body_timeout:g} s") from None
        except ClientDisconnect:
            raise ClientLeft from None
        return b"".join(parts)

    def error_response(self, error: Exception, request_id: str) -> Response:
        """The answer to an exception; unknown ones go to the log with their traceback."""
        described = describe(error, request_id)
        if described.status == 500:
            log.error("request %s failed", request_id, exc_info=error)
        headers = {"retry-after": "5"} if described.status == 503 else None
        return Response(described.body(), described.status, headers, media_type="application/json")


def json_response(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
