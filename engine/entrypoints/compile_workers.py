"""The processes in which `twinfer compile` compiles for a TPU, several programs at once.

libtpu overflows its own stacks where one process compiles two programs at once, so each has a process of its own. Used
by compile_command.py. Always true: no process outlives `close`.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from engine.core.launch import child_environment
from engine.entrypoints.compile_worker import Answer, CompileLaunch, Task, read_frame, write_frame
from engine.errors import ConfigError, StartupError

JOB_BYTES = 3 << 30
"""Memory counted for a process that compiles; Qwen3-0.6B's took 1.3 GB."""
JOB_CORES = 2
"""Cores counted for one: libtpu keeps one and a half busy with one program."""


def default_jobs() -> int:
    """Processes that this machine has cores and free memory for, at least 1."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return max(1, min(len(os.sched_getaffinity(0)) // JOB_CORES, free // JOB_BYTES))


class Workers:
    def __init__(self, jobs: int, launch: CompileLaunch) -> None:
        self.jobs = jobs
        command = [sys.executable, "-P", "-m", "engine.entrypoints.compile_worker"]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment())
            for _ in range(jobs)
        ]
        self._pool = ThreadPoolExecutor(jobs)
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._begun = [self._pool.submit(ask, process, launch) for process in self.processes]
        for process in self.processes:
            self._idle.put(process)

    def check_key(self, key: dict[str, str]) -> None:
        """Raises StartupError where a process would compile for something else than this one."""
        for begun in self._begun:
            theirs = begun.result().key
            for name in [*key, *theirs]:
                if key.get(name) != theirs.get(name):
                    raise StartupError(f"--jobs: a process that compiles has another {name}; use --jobs 1")

    def map(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Answers in the order of the tasks."""
        return self._pool.map(self._run, tasks)

    def _run(self, task: Task) -> Answer:
        process = self._idle.get()
        try:
            return ask(process, task)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()


def ask(process: subprocess.Popen[bytes], message: msgspec.Struct) -> Answer:
    """Raises ConfigError with what the process said, StartupError where it is gone."""
    if process.stdin is None or process.stdout is None:
        raise StartupError("--jobs: a process without pipes")
    try:
        write_frame(process.stdin, message)  # type: ignore[arg-type]
        frame = read_frame(process.stdout)  # type: ignore[arg-type]
    except BrokenPipeError:
        frame = None
    if frame is None:
        raise StartupError(f"--jobs: a process that compiles ended ({process.poll()}); try --jobs 1")
    answer = msgspec.msgpack.decode(frame, type=Answer)
    if answer.error:
        raise ConfigError(answer.error)
    return answer
