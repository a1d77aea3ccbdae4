"""A first start's kernels, compiled by several processes at once into Triton's cache on disk.

Triton compiles a kernel when it is launched first, one after another and mostly under the interpreter's lock. Here the
processes start while weights load; a rehearsal of the warm-up, in which no kernel is launched, lists every variant that
it would compile; the processes compile them by their signatures, and the warm-up proper finds them on disk. What a
process fails at the warm-up compiles itself. A note in the cache says that a configuration has been compiled: then no
process is started. Called by backends/torch/gpu.py. Needs triton.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import triton
from triton.runtime.driver import driver

from cuda_kernels.compile_jobs import FOLDER, Job

log = logging.getLogger("twinfer.compile")
MOST_PROCESSES = 16
LEAST_PROCESSES = 2  # fewer gain nothing


class Compilers:
    """Processes that compile; they end with `close`, or with this process."""

    def __init__(self, num_processes: int, note: Path) -> None:
        """note: a file to leave when all is compiled."""
        self._note = note
        path = os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "cuda_kernels.compile_jobs"]
        environ = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._processes = [subprocess.Popen(command, env=environ, **pipes) for _ in range(num_processes)]

    def compile(self, jobs: list[Job], told: Callable[[int, int], None] | None = None) -> None:
        """Returns when all are done. told: (done, total)."""
        target = driver.active.get_current_target()
        waiting: SimpleQueue[str] = SimpleQueue()
        for job in jobs:
            waiting.put(job.line(target))
        answers: SimpleQueue[str | None] = SimpleQueue()
        with ThreadPoolExecutor(len(self._processes)) as pool:
            for process in self._processes:
                pool.submit(serve, process, waiting, answers)
            left, done = len(self._processes), 0
            while left:
                answer = answers.get()
                if answer is None:
                    left -= 1
                    continue
                done += 1
                if told is not None:
                    told(done, len(jobs))
                if answer:
                    log.warning("compiled later, in this process: %s", answer)

    def close(self) -> None:
        """Ends the processes. What they made stays."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            process.wait()
        self._processes = []

    def leave_note(self) -> None:
        self._note.parent.mkdir(parents=True, exist_ok=True)
        self._note.touch()


def serve(process: subprocess.Popen[str], waiting: SimpleQueue[str], answers: SimpleQueue[str | None]) -> None:
    """Give a process one job after another; its answers are an error's text, or nothing. None: it takes no more."""
    try:
        while not waiting.empty() and process.stdin is not None and process.stdout is not None:
            process.stdin.write(waiting.get_nowait())
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                break
            answers.put(json.loads(answer))
    except Exception as error:  # of a thread: what is not compiled here is compiled by the warm-up
        log.warning("a compiling process failed: %s", error)
    answers.put(None)


def begin(configuration: str) -> Compilers | None:
    """Start the processes; None where this configuration has been compiled before, or processors are few."""
    note = note_of(configuration)
    count = min(len(os.sched_getaffinity(0)) - 1, MOST_PROCESSES)
    if count < LEAST_PROCESSES or note.exists():
        return None
    return Compilers(count, note)


def note_of(configuration: str) -> Path:
    """The file that says that all of it has been compiled. It lies in triton's cache, and goes with it."""
    return Path(triton.knobs.cache.dir) / f"twinfer-{identity(configuration)}"


def identity(configuration: str) -> str:
    """Of the kernels and of what chooses between their variants."""
    digest = hashlib.sha256(f"{triton.__version__} {configuration}".encode())
    for path in sorted((*FOLDER.glob("*.py"), *(FOLDER / "data").glob("*.json"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]
