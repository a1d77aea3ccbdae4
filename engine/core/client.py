"""CoreClient: how a front end reaches an engine core; ProcessClient: a core in a process of its own.

`send` never blocks. `receive` gives the messages that have come, in order. When the core has gone, `send` and
`receive` raise EngineDead, once every message that it still sent has been received. One thread may send while another
receives.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from engine.config import EngineConfig
from engine.core.launch import CoreChild, CoreLaunch
from engine.core.messages import (
    MAX_FRAME_BYTES,
    CoreFailed,
    CoreReady,
    FromCore,
    Shutdown,
    StartupProgress,
    ToCore,
)
from engine.core.sockets import PrivateFolder, open_reader, open_writer
from engine.errors import EngineDead, InvalidValue, StartupError

OnProgress = Callable[[StartupProgress], None]

STOP_GRACE_S = 5.0
MAX_DRAIN = 64  # messages a receive gives at most


class CoreClient(Protocol):
    """One engine core, seen from the front end."""

    def start(self, config: EngineConfig, model_path: Path, progress: OnProgress | None = None) -> CoreReady:
        """Start the core and wait until it can take requests. Raises StartupError (one line)."""

    def send(self, message: ToCore) -> None: ...

    def receive(self, timeout_s: float | None) -> list[FromCore]:
        """Messages that have come; waits at most `timeout_s` (None = for ever) for the first one."""

    def kill(self) -> None:
        """End the core at once: `start` and `receive` in another thread raise. `close` is still to be called."""

    def close(self) -> None:
        """Stop the core and free everything. May be called twice; no other thread may be in `receive`."""


class ProcessClient:
    """The core in its own process, over ZeroMQ on UNIX sockets in a directory that only this user can enter."""

    def __init__(self, module: str = "engine.core.process") -> None:
        self._module = module
        self._child: CoreChild | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromCore)
        self._dead: str | None = None  # why, once it is known
        self._close_lock = threading.Lock()
        self._closed = False
        self._killed = False

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def start(self, config: EngineConfig, model_path: Path, progress: OnProgress | None = None) -> CoreReady:
        self._folder = PrivateFolder()
        self._context = zmq.Context(io_threads=1)
        to_core, from_core = self._folder.path / "to_core", self._folder.path / "from_core"
        self._inbox = open_reader(self._context, from_core)
        self._outbox = open_writer(self._context, to_core, 0)
        launch = CoreLaunch(config, str(model_path), str(to_core), str(from_core), os.getpid())
        self._child = CoreChild(self._module, launch)
        if self._killed:
            self._child.kill()
        # also runs at interpreter exit
        sockets = (self._inbox, self._outbox)
        self._finalizer = weakref.finalize(self, abandon, self._child, self._context, sockets, self._folder)
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._poller.register(self._child.wake_fd, zmq.POLLIN)
        try:
            return self._wait_ready(progress)
        except BaseException:
            self.close(grace_s=0.5)
            raise

    def _wait_ready(self, progress: OnProgress | None) -> CoreReady:
        while True:
            try:
                messages = self.receive(None)
            except EngineDead as error:
                raise StartupError(str(error)) from None
            for message in messages:
                if isinstance(message, CoreReady):
                    return message
                if isinstance(message, StartupProgress) and progress is not None:
                    progress(message)

    def send(self, message: ToCore) -> None:
        if self._dead is not None or self._child is None:
            raise EngineDead(self._dead or "the engine is not started")
        frame = self._encoder.encode(message)
        if len(frame) > MAX_FRAME_BYTES:
            raise InvalidValue(f"prompt: the request of {len(frame)} bytes is too large; at most {MAX_FRAME_BYTES}")
        self._outbox.send(frame)

    def receive(self, timeout_s: float | None) -> list[FromCore]:
        if self._dead is not None or self._child is None:
            raise EngineDead(self._dead or "the engine is not started")
        ready = dict(self._poller.poll(None if timeout_s is None else int(timeout_s * 1000)))
        messages = self._drain()
        if self._child.wake_fd in ready and not messages:
            self._die(f"the engine core process ended: {self._child.describe_exit()}")
        return messages

    def _drain(self) -> list[FromCore]:
        messages: list[FromCore] = []
        while len(messages) < MAX_DRAIN:
            try:
                frame = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            message = self._decoder.decode(frame)
            if isinstance(message, CoreFailed):
                # what came before it still counts: this error is raised by the next receive
                self._dead = message.message
                if not messages:
                    self._die(message.message)
                break
            messages.append(message)
        return messages

    def _die(self, reason: str) -> None:
        self._dead = reason
        raise EngineDead(reason)

    def kill(self) -> None:
        self._killed = True
        if self._child is not None:
            self._child.kill()

    def close(self, grace_s: float = STOP_GRACE_S) -> None:
        with self._close_lock:
            if self._closed or self._child is None:
                return
            self._closed = True
        if self._dead is None and self._child.exit_code is None:
            self._outbox.send(self._encoder.encode(Shutdown()))
        self._dead = self._dead or "the engine is closed"
        self._finalizer.detach()
        self._child.stop(grace_s)
        self._inbox.close()
        self._outbox.close()
        self._context.term()
        self._folder.remove()


def abandon(
    child: CoreChild,
    context: zmq.Context[zmq.Socket[bytes]],
    sockets: tuple[zmq.Socket[bytes], ...],
    folder: PrivateFolder,
) -> None:
    """What is left to do when a client was dropped without close, or at interpreter exit.

    The sockets go first: a context that is collected before its sockets waits for them for ever.
    """
    child.kill()
    for socket in sockets:
        socket.close(linger=0)
    context.term()
    folder.remove()
