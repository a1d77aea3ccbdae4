"""The body of `twinfer compile` on the JAX side: every program of a runner compiled from shapes alone, into a bundle.

No weights are read and no step runs. The target is a device of this process, or a TPU slice that is
not here: libtpu compiles for it without one. Called by engine/entrypoints/compile_command.py.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from backends.jax import compile_cache, mesh
from backends.jax.aot import serialise
from backends.jax.compile import Programs
from backends.jax.key import key_of
from backends.jax.programs import ProgramSet
from backends.jax.weights import param_bytes, param_shapes
from backends.jax.workspace import workspace_bytes
from engine.runner import Built, DeviceInfo, Progress, RunnerConfig
from engine.specs.cache import CacheLayout
from engine.specs.executables import write


class Builder:
    """engine/runner.py's ExecutableBuilder."""

    def describe(self, device: str, tpu: str | None) -> DeviceInfo:
        if tpu is None:
            self._target = mesh.local(device)
        else:
            self._target = mesh.absent_tpu(tpu)
        return mesh.describe(self._target)

    def configure(self, config: RunnerConfig) -> None:
        self.split = self._target.split(config.tensor_size)
        mesh.keep_float32_exact(self.split.device, config.dtype)
        self._config, self.params = config, param_shapes(config.arch, config.dtype, self.split)

    def weight_bytes(self) -> int:
        """On one device."""
        return param_bytes(self.params)

    def memory(self) -> tuple[int, int]:
        """(total, free) bytes of one device."""
        return self._target.memory()

    def cache_budget_bytes(self) -> int:
        """As a runner's, with the weights counted as if they were there.

        Of a host an eighth less: what is free there differs from start to start, and the pages are fixed from here on.
        """
        total, free = self.memory()
        taken = self.weight_bytes() + self._workspace
        if self._target.platform == "cpu":
            return max(0, (free - taken) // mesh.HOST_SHARE // self.split.size * 7 // 8)
        return max(0, total - taken)

    @cached_property
    def _workspace(self) -> int:
        with compile_cache.disabled():
            return workspace_bytes(self._config, self.params, self.split)

    def build(self, layout: CacheLayout, folder: Path, progress: Progress) -> Built:
        programs = ProgramSet(self._config, layout, self.params, self.split).programs()
        made = Programs(self.split)
        with compile_cache.disabled():
            made.compile(programs, lambda done: progress("programs", done, len(programs)))
        manifest = write(
            folder,
            key_of(self._config, self.split),
            tuple(pool.num_pages for pool in layout.pools),
            (serialise(program, made[program.name]) for program in programs),
            self._workspace,
        )
        sizes = [entry.size for entry in manifest.programs.values()]
        return Built(num_programs=len(sizes), num_bytes=sum(sizes), key=manifest.key)
