"""The body of `twinfer compile` on the JAX side: every program of a runner compiled from shapes alone, into a bundle.

No weights are read and no step runs. The target is a device of this process, or a TPU slice that is
not here: libtpu compiles for it without one. Called by engine/entrypoints/compile_command.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from backends.jax import compile_cache, mesh
from backends.jax.aot import serialise
from backends.jax.compile import Program, Programs, text_of
from backends.jax.key import key_of
from backends.jax.programs import ProgramSet
from backends.jax.weights import param_bytes, param_shapes
from backends.jax.workspace import few_pages, measured, workspace_bytes
from engine.errors import fail
from engine.runner import Built, DeviceInfo, Measure, Progress, RunnerConfig
from engine.specs.cache import CacheLayout
from engine.specs.executables import Compiled, write


class Builder:
    """engine/runner.py's ExecutableBuilder."""

    def describe(self, device: str, tpu: str | None) -> DeviceInfo:
        if tpu is None:
            self._target = mesh.local(device)
        else:
            self._target = mesh.absent_tpu(tpu)
        return mesh.describe(self._target)

    def configure(self, config: RunnerConfig) -> None:
        self.split = self._target.split(config.tensor_size, config.num_replicas)
        mesh.keep_float32_exact(self.split.device, config.dtype)
        self._config, self.params = config, param_shapes(config.arch, config.dtype, self.split)
        self._workspace: int | None = None

    def weight_bytes(self) -> int:
        """On one device."""
        return param_bytes(self.params)

    def memory(self) -> tuple[int, int]:
        """(total, free) bytes of one device."""
        return self._target.memory()

    def key(self) -> dict[str, str]:
        return key_of(self._config, self.split)

    def sizes(self, name: str) -> tuple[int, int]:
        made = ProgramSet(self._config, few_pages(self._config), self.params, self.split)
        with compile_cache.disabled():
            return measured(made, named(made, name))

    def cache_budget_bytes(self, measure: Measure | None = None) -> int:
        """As a runner's, with the weights counted as if they were there.

        Of a host an eighth less: what is free there differs from start to start, and the pages are fixed from here on.
        """
        total, free = self.memory()
        taken = self.weight_bytes() + self._beside(measure)
        if self._target.platform == "cpu":
            return max(0, (free - taken) // mesh.HOST_SHARE // len(self.split.devices) * 7 // 8)
        return max(0, total - taken)

    def _beside(self, measure: Measure | None = None) -> int:
        """Bytes that steps take beside weights and pages; asked once."""
        if self._workspace is None:
            with compile_cache.disabled():
                self._workspace = workspace_bytes(self._config, self.params, self.split, measure)
        return self._workspace

    def compile(self, layout: CacheLayout, name: str) -> Compiled:
        made = ProgramSet(self._config, layout, self.params, self.split)
        program = named(made, name)
        with compile_cache.disabled():
            return serialise(program, made.build(program))

    def build(
        self,
        layout: CacheLayout,
        folder: Path,
        progress: Progress,
        elsewhere: Callable[[list[str]], Iterable[Compiled]] | None = None,
    ) -> Built:
        programs = ProgramSet(self._config, layout, self.params, self.split).programs()

        def here() -> Iterator[Compiled]:
            made = Programs(self.split)
            with compile_cache.disabled():
                made.compile(programs, lambda done: progress("programs", done, len(programs)))
            return (serialise(program, made[program.name]) for program in programs)

        def counted(compiled: Iterable[Compiled]) -> Iterator[Compiled]:
            for count, program in enumerate(compiled):
                progress("programs", count + 1, len(programs))
                yield program

        names = [text_of(program.name) for program in programs]
        manifest = write(
            folder,
            self.key(),
            tuple(pool.num_pages for pool in layout.pools),
            here() if elsewhere is None else counted(elsewhere(names)),
            self._beside(),
        )
        sizes = [entry.size for entry in manifest.programs.values()]
        return Built(num_programs=len(sizes), num_bytes=sum(sizes), key=manifest.key)


def named(made: ProgramSet, name: str) -> Program:
    """Raises InternalError where there is no such program."""
    for program in made.programs():
        if text_of(program.name) == name:
            return program
    fail(f"no program {name}")
