"""uvicorn with our way of ending: SIGTERM or SIGINT -> readyz 503, drain, stop; a second signal stops at once."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from engine.entrypoints.http_protocol import bounded_protocol
from engine.entrypoints.serving import Serving
from engine.entrypoints.settings import ServerSettings
from engine.errors import StartupError

log = logging.getLogger("twinfer.http")

POLL_S = 0.02
KEEP_ALIVE_S = 75
CLOSE_S = 5  # for answers to leave their buffers after the drain


class HttpServer(uvicorn.Server):
    """Serves one app until a signal, then drains. `on_give_up` ends the engine when the drain takes too long."""

    def __init__(self, app: FastAPI, settings: ServerSettings, on_give_up: Callable[[], Awaitable[None]]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                uds=settings.uds,
                root_path=settings.root_path,
                ssl_keyfile=settings.ssl_keyfile,
                ssl_certfile=settings.ssl_certfile,
                log_level=settings.uvicorn_log_level,
                access_log=False,
                server_header=False,
                http=bounded_protocol(settings.head_timeout),
                ws="none",
                lifespan="off",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        self._serving: Serving = app.state.serving
        self._settings = settings
        self._on_give_up = on_give_up
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler. Not chained to uvicorn's, which would raise the signal again at the end."""
        if self._loop is None or self._serving.draining:
            self.should_exit = self.force_exit = True
            return
        self._serving.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, name: str) -> None:
        log.info("%s: draining %d requests", name, self._serving.active)
        self._drain = asyncio.ensure_future(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        await asyncio.sleep(self._settings.drain_delay)
        self._serving.closed = True
        deadline = time.monotonic() + self._settings.drain_timeout
        while self._serving.active and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        if self._serving.active:
            log.warning("%d requests did not end within --drain-timeout", self._serving.active)
            await self._on_give_up()
        self.should_exit = True


def bind(settings: ServerSettings) -> socket.socket:
    """The listening socket, bound before the model loads, so that a taken port is told at once."""
    if settings.uds is not None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            path = Path(settings.uds)
            if path.is_socket():  # left behind by a server that was killed
                path.unlink()
            sock.bind(settings.uds)
            os.chmod(settings.uds, 0o600)
        except OSError as error:
            raise StartupError(f"--uds: cannot listen on {settings.uds!r}: {error.strerror}") from None
        return sock
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        raise StartupError(f"--host: {settings.host!r} is not an address of this machine") from None
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupError(f"--port: {settings.port} is in use; choose another with --port") from None
        raise StartupError(f"--host: cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    return sock


def check_tls(settings: ServerSettings) -> None:
    """Raises StartupError when key and certificate cannot be used, before anything is loaded."""
    if settings.ssl_certfile is None:
        return
    for flag, name in (("--ssl-certfile", settings.ssl_certfile), ("--ssl-keyfile", settings.ssl_keyfile)):
        if name is None or not os.access(name, os.R_OK):
            raise StartupError(f"{flag}: cannot read {name!r}")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except ssl.SSLError as error:
        raise StartupError(f"--ssl-certfile: certificate and key cannot be used: {error.reason}") from None


def url_of(settings: ServerSettings, sock: socket.socket) -> str:
    """Where clients on this machine reach the server."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    scheme = "https" if settings.ssl_certfile else "http"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{sock.getsockname()[1]}{settings.root_path}"
