"""The two ZeroMQ sockets between a client and its core: UNIX sockets, 0600, in a folder that only this user can enter.

Each side binds what it reads and connects what it writes. Always true: sending never blocks, since a connected socket
queues while nobody listens (a bound one would wait for a peer, for ever once that has died).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

import zmq

from engine.core.messages import MAX_FRAME_BYTES

MAX_PATH_BYTES = 100  # sun_path of a UNIX socket takes 107
PREFIX = "twinfer-"
LOCK = "lock"
SWEEP_AGE_S = 60.0


def open_reader(context: zmq.Context[zmq.Socket[bytes]], path: str | Path) -> zmq.Socket[bytes]:
    """A bound PULL socket. Frames over MAX_FRAME_BYTES cut their sender off."""
    socket = context.socket(zmq.PULL)
    socket.set_hwm(0)  # what is queued is bounded by the requests alive
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(f"ipc://{path}")
    Path(path).chmod(stat.S_IRUSR | stat.S_IWUSR)
    return socket


def open_writer(context: zmq.Context[zmq.Socket[bytes]], path: str | Path, linger_ms: int) -> zmq.Socket[bytes]:
    """A connected PUSH socket. linger_ms: how long its last frames may take to leave once it is closed."""
    socket = context.socket(zmq.PUSH)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, linger_ms)
    socket.setsockopt(zmq.RECONNECT_IVL, 10)  # ms; the reader may not have bound yet
    socket.connect(f"ipc://{path}")
    return socket


class PrivateFolder:
    """A new directory with mode 0700, its path short enough for UNIX sockets, locked while its maker lives.

    A maker that is killed cannot clean up: the next one removes what nobody holds a lock on any more.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        if len(bytes(parent)) > MAX_PATH_BYTES - len("/twinfer-12345678/from_core"):
            parent = Path("/tmp")
        sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(parent: Path) -> None:
    """Remove our folders in `parent` whose makers are gone. Errors are no matter: somebody else was faster."""
    for folder in parent.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            facts = folder.lstat()
            # a fresh one may not be locked yet
            if facts.st_uid != os.getuid() or time.time() - facts.st_mtime < SWEEP_AGE_S:
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
