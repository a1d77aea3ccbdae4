"""Every program of a runner, made before it is ready: compiled or loaded from a bundle, kept by name, then only called.

A name that is not here raises, so nothing can compile while requests are served. XLA compiles without the interpreter
lock, so a few threads compile at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from backends.jax.split import Split
from engine.errors import check, fail

OPTIONS: Mapping[str, dict[str, int | str]] = {
    # XLA takes what a kernel writes into the cache for another cache: it believes that nothing fits, and computes in
    # every layer again what it could keep
    "gpu": {"xla_gpu_memory_limit_slop_factor": 10_000},
}
"""What the compiler of a platform is told."""

Name = tuple[str, *tuple[int, ...]]


def text_of(name: Name) -> str:
    """("forward", 128) -> forward-128."""
    return "-".join(map(str, name))


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
    """Programs by name. load: makes one without compiling it; None = all are compiled."""

    def __init__(self, split: Split, load: Callable[[Program], Any] | None = None) -> None:
        self._whole = split.sharding()
        self._platform = split.platform
        self._load = load
        self._compiled: dict[Name, Any] = {}

    def __contains__(self, name: Name) -> bool:
        return name in self._compiled

    def __len__(self) -> int:
        return len(self._compiled)

    @property
    def num_compiles(self) -> int:
        """Of the programs here, those that were compiled and not loaded."""
        return len(self._compiled) if self._load is None else 0

    def compile(self, programs: Iterable[Program], done: Callable[[int], None]) -> None:
        """Make all; done(n) is called in this thread after each."""
        make = self._load or self.build
        todo = list(programs)
        for program in todo:
            check(program.name not in self._compiled, f"{program.name} is compiled twice")
        with ThreadPoolExecutor(max(1, min(4, len(os.sched_getaffinity(0))))) as pool:
            # libtpu overflows its own stacks where two programs are compiled at once (seen with 0.0.42.1)
            at_once = self._platform != "tpu" or self._load is not None
            jobs = pool.map(make, todo) if at_once else map(make, todo)
            for count, (program, made) in enumerate(zip(todo, jobs, strict=True)):
                self._compiled[program.name] = made
                done(count + 1)

    def build(self, program: Program) -> Any:
        """Compiled with every argument kept, used or not: a bundle passes them by number."""
        outs = self._whole if program.outs is None else program.outs
        jitted = jax.jit(program.function, donate_argnums=program.donate, out_shardings=outs, keep_unused=True)
        args = jax.tree_util.tree_map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or self._whole),
            program.args,
        )
        return jitted.lower(*args).compile(OPTIONS.get(self._platform))

    def __getitem__(self, name: Name) -> Callable[..., Any]:
        program = self._compiled.get(name)
        if program is None:
            fail(f"no program {name}: it was not made at warm-up")
        return program

    def temp_bytes(self, name: Name) -> int:
        """Scratch memory of one run, beyond arguments and results."""
        return int(self[name].memory_analysis().temp_size_in_bytes)
