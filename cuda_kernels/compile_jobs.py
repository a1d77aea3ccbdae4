"""What a launch would compile, as a line of text that another process can compile: it fills Triton's cache on disk.

A rehearsal lists the variants of kernels that some launches ask for, and launches nothing. Used by compile_ahead.py and
by backends/torch/gpu.py. Needs triton; no GPU is needed to compile.
    python -m cuda_kernels.compile_jobs: a process that compiles; a job a line comes in, an answer a line goes out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, convert_to_tuple_if_list

from cuda_kernels import (
    attention_decode,
    attention_items,
    attention_ragged,
    attention_tiles,
    candidates,
    fused,
    invariant_attention,
    invariant_linear,
    quant_kernels,
    rope_cache,
    sampler,
    sampling,
    score,
    small_linear_kernels,
    split_sum,
    step_begin,
    wide_gated,
)

FOLDER = Path(__file__).parent
MODULES = {
    module.__name__: module
    for module in (
        attention_decode,
        attention_items,
        attention_ragged,
        attention_tiles,
        candidates,
        fused,
        invariant_attention,
        invariant_linear,
        quant_kernels,
        rope_cache,
        sampler,
        sampling,
        score,
        small_linear_kernels,
        split_sum,
        step_begin,
        wide_gated,
    )
}  # that have kernels of triton


@dataclass(frozen=True, slots=True)
class Job:
    """A variant of a kernel."""

    module: str
    name: str
    data: str  # triton's own description: signature, constants, attributes, options

    def line(self, target: GPUTarget) -> str:
        """As a process takes it."""
        where = {"target": [target.backend, target.arch, target.warp_size]}
        return json.dumps({"module": self.module, "name": self.name, "data": self.data, **where}) + "\n"


@contextmanager
def rehearsal() -> Iterator[dict[str, Job]]:
    """Inside, a launch runs nothing and compiles nothing: what it would compile is listed."""
    jobs: dict[str, Job] = {}

    def ask(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:  # the names are triton's
        data = compile["specialization_data"]
        jobs[f"{fn.module}.{fn.name} {data}"] = Job(fn.module, fn.name, data)
        return True  # do not compile

    def without_launch(kernel: Any, *args: Any, **options: Any) -> Any:
        return launch(kernel, *args, **{**options, "warmup": True})

    launch, former = JITFunction.run, knobs.runtime.jit_cache_hook
    JITFunction.run, knobs.runtime.jit_cache_hook = without_launch, ask  # type: ignore[method-assign]
    try:
        yield jobs
    finally:
        JITFunction.run, knobs.runtime.jit_cache_hook = launch, former  # type: ignore[method-assign]


def prime() -> None:
    """Compute every kernel's hash in one order.

    Triton hashes a function with the constants of the functions that it calls only where those were hashed before, so
    that a hash depends on what came first. Processes of one order find each other's kernels.
    """
    for module in MODULES.values():
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                _ = value.cache_key


def compile_job(job: Job, target: GPUTarget) -> None:
    """Compile a variant into the cache: the counterpart of what JITFunction.run does at a first launch."""
    told = json.loads(job.data)
    kernel = getattr(MODULES[job.module], job.name)
    constants = zip(told["constant_keys"], told["constant_vals"], strict=True)
    attributes = {tuple(key): value for key, value in zip(told["attrs_keys"], told["attrs_vals"], strict=True)}
    signature = {name: convert_to_tuple_if_list(kind) for name, kind in told["signature"].items()}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in told["options"].items()}
    source = ASTSource(kernel, signature, {tuple(key): constant(value) for key, value in constants}, attributes)
    triton.compile(source, target=target, options=make_backend(target).parse_options(options).__dict__)


def constant(value: Any) -> Any:
    """A constant of a kernel, from JSON."""
    if isinstance(value, list):
        return tuple(constant(part) for part in value)
    if isinstance(value, str) and triton.language.dtype.is_dtype(value):
        return triton.language.dtype(value)
    if isinstance(value, dict) and "constexpr" in value:
        return triton.language.constexpr(value["constexpr"])
    return value


def main() -> None:
    prime()
    for line in sys.stdin:
        job = json.loads(line)
        target = GPUTarget(*job.pop("target"))
        error = ""
        try:
            compile_job(Job(**job), target)
        except Exception as failure:  # the process's top: told to its parent
            error = f"{job['name']}: {type(failure).__name__}: {failure}"
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main()
