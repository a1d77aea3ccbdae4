"""The engine core in a process of its own: `python -m engine.core.process`, started by ProcessClient.

Reads a CoreLaunch from stdin, starts the core, then turns two ZeroMQ sockets into CoreLoop calls. Polls without
blocking while there is work, blocks when idle. Always true: a message that cannot be decoded or handled fails at most
the request it names; the process ends on Shutdown, on SIGTERM once the work is done, or when its parent has gone.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import time

import msgspec
import zmq

from engine.core.build import BuildCore, Core, build_core
from engine.core.launch import CoreLaunch, read_launch
from engine.core.lifeline import hold_on_to_parent, leave_stdout_alone
from engine.core.messages import (
    MAX_FRAME_BYTES,
    AbortRequests,
    AddRequest,
    CoreFailed,
    FromCore,
    RequestFailed,
    Shutdown,
    StartupProgress,
    StepOutputs,
    ToCore,
)
from engine.core.sockets import open_reader, open_writer
from engine.errors import RequestError, StartupError
from engine.runner import Progress

log = logging.getLogger("twinfer.core")

IDLE_POLL_MS = 500  # how late a SIGTERM is noticed when idle
SPIN_S = 20e-6  # a step shorter than this, without output, did nothing: do not spin on it
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError)
LINGER_MS = 2000  # how long the last messages may take to leave
COPY_BYTES = 1 << 16  # larger frames are handed to ZeroMQ without a copy


class CoreProcess:
    """Sockets and signals around one Core."""

    def __init__(self, launch: CoreLaunch) -> None:
        self.launch = launch
        self._context = zmq.Context(io_threads=1)
        self._inbox = open_reader(self._context, launch.to_core)
        self._outbox = open_writer(self._context, launch.from_core, LINGER_MS)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToCore)
        self._terms = 0  # SIGTERMs seen
        self.stopping = False

    def start(self, build: BuildCore) -> Core | None:
        """Build the core, or tell the client in one line why not."""
        try:
            core, ready = build(self.launch.config, self.launch.folder, self._progress())
        except StartupError as error:
            self.send(CoreFailed(str(error)))
            return None
        except Exception as error:  # process top: the client is told, the log has the trace
            log.exception("the engine core could not start")
            self.send(CoreFailed(f"{type(error).__name__} while starting the engine core: {first_line(error)}"))
            return None
        gc.collect()
        gc.freeze()  # what start-up made lives on: later collections skip it
        self.send(ready)
        return core

    def _progress(self) -> Progress:
        sent = 0.0

        def report(phase: str, done: int, total: int) -> None:
            nonlocal sent
            now = time.monotonic()
            if done >= total or now - sent > 0.05:
                sent = now
                self.send(StartupProgress(phase, done, total))

        return report

    def send(self, message: FromCore) -> None:
        frame = self._encoder.encode(message)
        if len(frame) <= MAX_FRAME_BYTES:
            self._outbox.send(frame, 0, len(frame) < COPY_BYTES)
            return
        if isinstance(message, StepOutputs) and message.prompt_logprobs:
            # only prompt logprobs can grow like this: fail their requests, keep everybody else's tokens
            for key in message.prompt_logprobs:
                self.send(RequestFailed(key, "too_large", "prompt_logprobs: the answer is too large to send"))
            message.prompt_logprobs = None
            self.send(message)

    def on_sigterm(self, _signal: int, _frame: object) -> None:
        self._terms += 1

    def stop(self) -> None:
        """Leave `serve` after the turn that is running. May be called from another thread."""
        self.stopping = True

    def receive(self, core: Core, timeout_ms: int) -> bool:
        """Handle every message that has come, wait at most `timeout_ms` for the first one; whether there was any."""
        if not self._inbox.poll(timeout_ms):
            return False
        while not self.stopping:
            try:
                frame = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._handle(core, frame)
        return True

    def _handle(self, core: Core, frame: bytes) -> None:
        try:
            message = self._decoder.decode(frame)
        except DECODE_ERRORS as error:
            self._refuse(frame, "invalid_request", first_line(error))
            return
        if isinstance(message, Shutdown):
            self.stopping = True
            return
        try:
            core.handle(message)
        except RequestError as error:
            self._refuse(frame, error.code, first_line(error))
        except Exception:  # the boundary of one request (R1)
            if not isinstance(message, AddRequest):
                raise
            log.exception("request with key %d failed on admission", message.key)
            core.handle(AbortRequests(list(range(message.key, message.key + message.params.n))))
            self._refuse(frame, "engine_error", "internal error on admission")

    def _refuse(self, frame: bytes, code: str, reason: str) -> None:
        """Answer for the request that the frame is about, if that can be told."""
        log.warning("a message was refused: %s", reason)
        key = key_of(frame)
        if key is not None:
            self.send(RequestFailed(key, code, reason))

    def serve(self, core: Core) -> None:
        """Until told to stop: take messages, run a step, send what it gave."""
        idle_step = False
        while not self.stopping:
            busy = core.has_work
            if self._terms and (not busy or self._terms > 1):
                return
            received = self.receive(core, (1 if idle_step else 0) if busy else IDLE_POLL_MS)
            if self.stopping or not (received or busy):
                continue
            begun = time.perf_counter()
            outputs = core.step()
            for message in outputs:
                self.send(message)
            idle_step = not outputs and time.perf_counter() - begun < SPIN_S

    def close(self) -> None:
        self._inbox.close()
        self._outbox.close()
        self._context.term()  # waits for LINGER_MS at most


def key_of(frame: bytes) -> int | None:
    """The request key of an AddRequest frame that could not be decoded as one."""
    try:
        match msgspec.msgpack.decode(frame):
            case ["add", int(key), *_]:
                return key
    except DECODE_ERRORS:
        pass
    return None


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def run(build: BuildCore) -> int:
    """The life of the core's process; the exit code."""
    launch = read_launch(0)
    leave_stdout_alone()
    process = CoreProcess(launch)
    hold_on_to_parent(launch.parent_pid, process.stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, process.on_sigterm)
    core = process.start(build)
    code = 0 if core is not None else 1
    if core is not None:
        try:
            process.serve(core)
        except Exception as error:  # process top: an invariant of the engine broke
            log.exception("the engine core failed")
            process.send(CoreFailed(f"{type(error).__name__} in the engine core: {first_line(error)}"))
            code = 1
        core.shutdown()
    process.close()
    return code


def main() -> int:
    # ours in full, of libraries what a user must know: jax tells at INFO which platforms it did not find
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, stream=sys.stderr)
    logging.getLogger("twinfer").setLevel(logging.INFO)
    return run(build_core)


if __name__ == "__main__":
    sys.exit(main())
