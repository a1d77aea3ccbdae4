"""The two ZeroMQ sockets between a client and its core: UNIX sockets, 0600, in a folder that only this user can enter.

Each side binds what it reads and connects what it writes. Always true: sending never blocks, since a connected socket
queues while nobody listens (a bound one would wait for a peer, for ever once that has died).
"""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import zmq

from engine.core.messages import MAX_FRAME_BYTES

MAX_PATH_BYTES = 100  # sun_path of a UNIX socket takes 107


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


def private_folder() -> Path:
    """A new directory with mode 0700, with a path short enough for UNIX sockets."""
    folder = Path(tempfile.mkdtemp(prefix="twinfer-"))
    if len(bytes(folder)) > MAX_PATH_BYTES - len("/from_core"):
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="twinfer-", dir="/tmp"))
    return folder
