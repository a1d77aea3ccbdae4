"""An app over the alphabet engine, in process and behind a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
import uvicorn

from engine.entrypoints.http import create_app
from engine.entrypoints.settings import ServerSettings
from tests.engine.entrypoints.alphabet_engine import AlphabetEngine

SETTINGS = ServerSettings()


class App:
    """An app in this event loop: `client` talks to it without a socket."""

    def __init__(self, engine: AlphabetEngine, settings: ServerSettings = SETTINGS) -> None:
        self.engine = engine
        self.app = create_app(engine, settings, model_names=("letters", "alias"))
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture
def app() -> App:
    return App(AlphabetEngine())


@pytest.fixture
def keyed_app() -> App:
    return App(AlphabetEngine(), replace(SETTINGS, api_key=("secret-one", "secret-two")))


class Server:
    """The app behind uvicorn in a thread, as clients meet it."""

    def __init__(self, engine: AlphabetEngine, http: type[asyncio.Protocol] | str = "auto") -> None:
        self.engine = engine
        self.app = create_app(engine, SETTINGS, model_names=("letters",))
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="error", lifespan="off", http=http))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._socket])))
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(AlphabetEngine(step_s=0.005))
    yield server
    server.stop()
