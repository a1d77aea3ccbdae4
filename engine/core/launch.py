"""How a client starts the engine core's process: argv, the launch message on stdin, and knowing at once when it ends.

Owned by ProcessClient. Always true: the child dies with its parent. Its stdin is a pipe that nobody else holds (end
of file = parent gone), and on Linux it asks for SIGKILL when the thread that made it ends. That thread therefore does
nothing but wait for the child, which is also how its end is noticed without polling.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from engine.config import EngineConfig

LENGTH_BYTES = 4
MAX_LAUNCH_BYTES = 1 << 20


class CoreLaunch(msgspec.Struct):
    """What the core's process reads from stdin: a little-endian u32 length, then this as msgpack."""

    config: EngineConfig
    model_path: str
    to_core: str  # path of the socket that the core binds and reads from
    from_core: str  # path of the one that the client has bound; the core writes to it
    parent_pid: int

    @property
    def folder(self) -> Path:
        return Path(self.model_path)


def read_launch(fd: int) -> CoreLaunch:
    """Read the launch message. Leaves the pipe open: its end of file means that the parent has gone."""
    size = int.from_bytes(read_exactly(fd, LENGTH_BYTES), "little")
    if size > MAX_LAUNCH_BYTES:
        raise ValueError(f"launch message of {size} bytes is more than {MAX_LAUNCH_BYTES}")
    return msgspec.msgpack.decode(read_exactly(fd, size), type=CoreLaunch)


def read_exactly(fd: int, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(fd, size - len(parts))
        if not part:
            raise EOFError("the launch message ended early")
        parts += part
    return bytes(parts)


class CoreChild:
    """The core's process. `wake_fd` becomes readable once it has ended."""

    def __init__(self, module: str, launch: CoreLaunch) -> None:
        self.wake_fd, self._wake_write = os.pipe()
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._spawn_error: OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(module, launch), name="twinfer-core", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._spawn_error is not None:
            raise self._spawn_error

    def _run(self, module: str, launch: CoreLaunch) -> None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],
                stdin=subprocess.PIPE,
                env=child_environment(),
                process_group=0,  # Ctrl-C in a terminal goes to the parent, which then tells the child
            )
        except OSError as error:
            self._spawn_error = error
            os.close(self._wake_write)
            os.close(self.wake_fd)
            self._started.set()
            return
        self._process = process
        payload = msgspec.msgpack.encode(launch)
        with contextlib.suppress(BrokenPipeError):  # it died at once: wait() tells
            os.write(process.stdin.fileno(), len(payload).to_bytes(LENGTH_BYTES, "little") + payload)  # type: ignore[union-attr]
        self._started.set()
        process.wait()
        with contextlib.suppress(BrokenPipeError):  # the reader may have closed its end
            os.write(self._wake_write, b"\0")
        os.close(self._wake_write)  # here and nowhere else: the number may be somebody else's a moment later

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the engine core process was not started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -N after signal N."""
        return self.process.returncode

    def describe_exit(self) -> str:
        """How it ended, for people."""
        code = self.exit_code
        if code is None:
            return "still running"
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"killed by {name}" + ("; often out of memory" if name == "SIGKILL" else "")

    def kill(self) -> None:
        """End it now and do not wait; its thread reaps it."""
        self.process.kill()

    def stop(self, grace_s: float) -> None:
        """Wait `grace_s` for it to end by itself, then terminate, then kill. Returns when it has gone."""
        for action in (None, self.process.terminate, self.process.kill):
            if action is not None:
                action()
            self._thread.join(grace_s if action is None else 2.0)
            if not self._thread.is_alive():
                break
        if self.process.stdin is not None:
            self.process.stdin.close()
        os.close(self.wake_fd)


def child_environment() -> dict[str, str]:
    """The parent's, with this package first on the path: `-P` keeps the working directory off it."""
    root = str(Path(__file__).parents[2])
    old = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": root if not old else root + os.pathsep + old}
