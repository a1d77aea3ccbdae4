"""CoreLink: the event loop's end of a core client. One thread receives; messages, replies and death reach the loop.

Used by async_engine.py. All methods are called from the loop that ran `start`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from engine.config import EngineConfig
from engine.core.client import CoreClient, OnProgress
from engine.core.messages import AbortRequests, CoreReady, FromCore, Ping, Reply, ResetPrefixCache, ToCore
from engine.errors import EngineDead

log = logging.getLogger("twinfer.engine")

MAX_BATCHES = 2  # of messages on their way to the loop: one is handled while the next one is read
RECEIVE_S = 0.25  # how late the receiving thread notices that it should stop


class CoreLink:
    """Always true: after `on_dead` was called, once, nothing else is called."""

    def __init__(
        self, client: CoreClient, on_message: Callable[[FromCore], None], on_dead: Callable[[str], None]
    ) -> None:
        self.client = client
        self._on_message = on_message
        self._on_dead = on_dead
        self._calls: dict[int, asyncio.Future[bool]] = {}
        self._next_call = 0
        self.dead: str | None = "the engine is not started"
        self.stopping = threading.Event()
        self._room = threading.Semaphore(MAX_BATCHES)
        self._thread: threading.Thread | None = None

    async def start(self, config: EngineConfig, path: Path, progress: OnProgress | None) -> CoreReady:
        """Start the core. `progress` is called from another thread. Raises StartupError."""
        self._loop = asyncio.get_running_loop()
        starting = asyncio.create_task(asyncio.to_thread(self.client.start, config, path, progress))
        try:
            ready = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self.client.kill()  # the thread that waits for the core ends with it
            await asyncio.wait([starting])
            raise
        self.dead = None
        self._thread = threading.Thread(target=self._receive, name="twinfer-receive", daemon=True)
        self._thread.start()
        return ready

    def check(self) -> None:
        """Raises EngineDead when the core has gone."""
        if self.dead is not None:
            raise EngineDead(self.dead)

    def send(self, message: ToCore) -> None:
        """Raises EngineDead."""
        self.check()
        self.client.send(message)

    def abort(self, keys: list[int]) -> None:
        """Let the core stop working on these keys; a core that has gone has stopped already."""
        if keys and self.dead is None:
            try:
                self.client.send(AbortRequests(keys))
            except EngineDead as error:
                self.die(str(error))

    async def ping(self) -> bool:
        """A round trip through the core's loop."""
        return await self._call(Ping(0))

    async def reset_prefix_cache(self) -> bool:
        return await self._call(ResetPrefixCache(0))

    async def _call(self, message: ResetPrefixCache | Ping) -> bool:
        self.check()
        self._next_call += 1
        message.call = self._next_call
        future: asyncio.Future[bool] = self._loop.create_future()
        self._calls[message.call] = future
        try:
            self.client.send(message)
            return await future
        finally:
            del self._calls[message.call]

    def _receive(self) -> None:
        """The receiving thread: batches of messages to the loop, until the core ends or we stop.

        A loop that is behind gets fewer, larger batches: what has come is read only when it is about to be handled.
        """
        try:
            while not self.stopping.is_set():
                if not self._room.acquire(timeout=RECEIVE_S):
                    continue
                messages = self.client.receive(RECEIVE_S)
                if messages:
                    self._loop.call_soon_threadsafe(self._on_batch, messages)
                else:
                    self._room.release()
        except EngineDead as error:
            if not self.stopping.is_set():
                self._loop.call_soon_threadsafe(self.die, str(error))
        except RuntimeError:
            log.debug("the event loop closed before the engine")

    def _on_batch(self, messages: list[FromCore]) -> None:
        self._room.release()
        for message in messages:
            if self.dead is not None:
                return
            if isinstance(message, Reply):
                future = self._calls.get(message.call)
                if future is not None and not future.done():
                    future.set_result(message.ok)
            else:
                self._take_in(message)

    def _take_in(self, message: FromCore) -> None:
        """A message that cannot be taken in leaves requests without answers: better an end than a wait for ever."""
        try:
            self._on_message(message)
        except Exception as error:  # top of the loop's callback
            log.exception("a message of the core could not be taken in")
            self.die(f"{type(error).__name__} in the front end")

    def die(self, reason: str) -> None:
        """The core has gone, or is given up: whoever waits is told, once."""
        if self.dead is not None:
            return
        self.dead = reason
        if not self.stopping.is_set():
            log.error("%s", reason)
        self._on_dead(reason)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDead(reason))

    async def close(self) -> None:
        """Stop the core and the thread. May be called twice."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        self.die("the engine is shutting down")
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.client.close)
