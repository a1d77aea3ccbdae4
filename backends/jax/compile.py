"""Every program of a runner, compiled before it is ready: lowered and compiled ahead, kept by name, then only called.

A name that is not here raises, so nothing can compile while requests are served. XLA compiles without the interpreter
lock, so a few threads compile at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from backends.jax.split import Split
from engine.errors import check, fail

Name = tuple[str, *tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Program:
    """A function and the shapes that it is compiled for, whole on each device where they do not say otherwise.

    donate: arguments whose memory the results take over.
    """

    name: Name
    function: Callable[..., Any]
    args: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    outs: Any = None  # where results lie, as a prefix of their tree; None: whole on each device


class Programs:
    """Compiled programs by name."""

    def __init__(self, split: Split) -> None:
        self._whole = split.sharding()
        self._compiled: dict[Name, Any] = {}

    def __contains__(self, name: Name) -> bool:
        return name in self._compiled

    def __len__(self) -> int:
        return len(self._compiled)

    def compile(self, programs: Iterable[Program], done: Callable[[int], None]) -> None:
        """Compile all; done(n) is called in this thread after each."""
        threads = max(1, min(4, len(os.sched_getaffinity(0))))
        with ThreadPoolExecutor(threads) as pool:
            jobs = []
            for program in programs:
                check(program.name not in self._compiled, f"{program.name} is compiled twice")
                jobs.append((program.name, pool.submit(self.build, program)))
            for count, (name, job) in enumerate(jobs):
                self._compiled[name] = job.result()
                done(count + 1)

    def build(self, program: Program) -> Any:
        outs = self._whole if program.outs is None else program.outs
        jitted = jax.jit(program.function, donate_argnums=program.donate, out_shardings=outs)
        args = jax.tree_util.tree_map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or self._whole),
            program.args,
        )
        return jitted.lower(*args).compile()

    def __getitem__(self, name: Name) -> Callable[..., Any]:
        program = self._compiled.get(name)
        if program is None:
            fail(f"no program {name}: it was not compiled at warm-up")
        return program

    def temp_bytes(self, name: Name) -> int:
        """Scratch memory of one run, beyond arguments and results."""
        return int(self[name].memory_analysis().temp_size_in_bytes)
