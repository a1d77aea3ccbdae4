"""A process that compiles programs for `twinfer compile`: `python -P -m engine.entrypoints.compile_worker`.

Reads from stdin, and writes to what was stdout, frames of a little-endian u32 length and msgpack: a CompileLaunch and
its answer, then a Task and its answer each, until stdin ends. It goes the way of compile_command.py from the same
flags; the parent compares the keys. Always true: what anything prints goes to stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from engine.config import EngineConfig
from engine.errors import TwinferError, check
from engine.resolve import plan_cache, resolve
from engine.runner import load_builder
from engine.specs.cache import CacheLayout
from engine.specs.checkpoint import read_config
from engine.specs.executables import Compiled
from engine.specs.families import parse_config

LENGTH_BYTES = 4
FITS = 1 << 62  # bytes left for pages: the parent has counted them


class CompileLaunch(msgspec.Struct):
    config: EngineConfig
    model_path: str
    tpu: str | None


class Task(msgspec.Struct):
    """num_pages: of each pool, () = say what the program takes of a device beside weights and pages."""

    name: str
    num_pages: tuple[int, ...]


class Answer(msgspec.Struct):
    """One of: the key of the bundle, a program, its (scratch, code) bytes, why there is none."""

    key: dict[str, str] = {}
    program: tuple[str, bytes, str, Any] | None = None
    sizes: tuple[int, int] = (0, 0)
    error: str = ""


class Worker:
    """The builder of one launch, and the layout of the last task."""

    def __init__(self, launch: CompileLaunch) -> None:
        self._config = launch.config
        self._builder = load_builder("jax")
        device = self._builder.describe(launch.config.device, launch.tpu)
        self._resolved = resolve(launch.config, parse_config(read_config(Path(launch.model_path))), device)
        self._builder.configure(self._resolved.runner)
        self._layouts: dict[tuple[int, ...], CacheLayout] = {}

    @property
    def key(self) -> dict[str, str]:
        return self._builder.key()

    def answer(self, task: Task) -> Answer:
        if not task.num_pages:
            return Answer(sizes=self._builder.sizes(task.name))
        if task.num_pages not in self._layouts:
            self._layouts[task.num_pages] = plan_cache(self._config, self._resolved, FITS, task.num_pages)[0]
        made: Compiled = self._builder.compile(self._layouts[task.num_pages], task.name)
        return Answer(program=made)


def read_frame(file: BinaryIO) -> bytes | None:
    """None at the end of the pipe."""
    head = file.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    size = int.from_bytes(head, "little")
    data = file.read(size)
    return data if len(data) == size else None


def write_frame(file: BinaryIO, message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    file.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
    file.flush()


def main() -> int:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tasks = sys.stdin.buffer
    worker: Worker | None = None
    while (frame := read_frame(tasks)) is not None:
        try:
            if worker is None:
                worker = Worker(msgspec.msgpack.decode(frame, type=CompileLaunch))
                answer = Answer(key=worker.key)
            else:
                answer = worker.answer(msgspec.msgpack.decode(frame, type=Task))
        except TwinferError as error:
            answer = Answer(error=str(error))
        except Exception as error:  # process top: the parent ends with it
            answer = Answer(error=f"{type(error).__name__}: {str(error).splitlines()[:1]}")
        write_frame(answers, answer)
    check(worker is not None, "no launch message came")
    return 0


if __name__ == "__main__":
    sys.exit(main())
