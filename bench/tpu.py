"""What becomes of whole models on TPU slices that are not here: memory, programs, collectives, beside the plan.

python -m bench.tpu [MODEL...] [--all] [--write]    prints the table, or puts it into docs/tpu.md

For each model the engine's own way is gone as far as it goes without a chip: resolve, weights as shapes, KV pages from
the memory that is left, then the forward and sampling programs of the largest decode bucket and the largest step (with
--all every program) through libtpu's compiler. Memory is what its memory analysis says of one device, weights and
pages are what the arrays take. Nothing runs. Needs libtpu (pip install 'twinfer[tpu]').
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.jax.build import Builder
from backends.jax.compile import Programs
from backends.jax.programs import ProgramSet
from backends.jax.workspace import tables_of
from bench.shapes import GEMMA_27B, INT8, LLAMA_8B, LLAMA_70B, QWEN3_06B
from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.core.start import kv_budget
from engine.resolve import plan_cache, resolve
from engine.specs.checkpoint import read_config
from engine.specs.families import parse_config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tpu.md"
MARKS = ("<!-- bench.tpu -->", "<!-- /bench.tpu -->")
GIB = 1 << 30
CASES = {
    "Qwen3-0.6B": (QWEN3_06B, "v5e", 1),
    "Llama-3.1-8B": (LLAMA_8B, "v6e", 1),
    "Llama-3.1-8B int8": (LLAMA_8B | {"quantization_config": INT8}, "v5e", 1),
    "Gemma-3-27B": (GEMMA_27B, "v6e:2x2", 4),
    "Llama-3.3-70B": (LLAMA_70B, "v6e:2x4", 8),
}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


@dataclass(frozen=True, slots=True)
class Found:
    """One compiled program, bytes on one device."""

    name: str
    seconds: float
    arguments: int
    aliased: int
    outputs: int
    scratch: int
    code: int
    num_arguments: int
    collectives: dict[str, int]  # a loop over layers counts once

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.scratch


def prepared(name: str) -> tuple[Builder, Any, Any, int, ProgramSet]:
    """(builder, resolved configuration, layout of the cache, longest request, programs) of a case, weights absent."""
    shape, slice_name, ranks = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        arch = parse_config(read_config(Path(folder)))
    config = EngineConfig(
        model=ModelConfig(load_format="dummy"), parallel=ParallelConfig(tensor_parallel_size=ranks), device="auto"
    )
    builder = Builder()
    device = builder.describe("auto", slice_name)
    resolved = resolve(config, arch, device)
    builder.configure(resolved.runner)
    layout, length, _ = plan_cache(config, resolved, kv_budget(config, device, builder.cache_budget_bytes(), None))
    made = ProgramSet(resolved.runner, layout, builder.params, builder.split)
    return builder, resolved, layout, length, made


def compile_case(name: str, every: bool) -> tuple[list[str], list[Found]]:
    """(cells of the plan, programs)."""
    _, slice_name, ranks = CASES[name]
    builder, resolved, layout, length, made = prepared(name)
    programs = made.programs()
    largest, rows = max(resolved.runner.token_buckets), max(resolved.runner.row_buckets)
    wanted = {("forward", rows), ("forward", largest), ("sample", rows), ("turns", rows)}
    compiler, found = Programs(builder.split), []
    for program in programs:
        if every or program.name in wanted:
            found.append(measure(compiler, program))
            print(f"{name:18} {found[-1]}", flush=True)
    pages = sum(pool.num_pages * pool.page_bytes for pool in layout.pools)
    weights = builder.weight_bytes()
    beside = max(program.scratch + program.outputs - program.aliased for program in found)
    peak = weights + pages + beside + tables_of({program.name: program for program in programs})
    total, _ = builder.memory()
    cells = [
        f"{slice_name}, {ranks} device{'s' * (ranks > 1)}",
        f"{weights / GIB:.2f}",
        f"{pages / GIB:.2f}",
        f"{length:,}",
        f"{max(program.scratch for program in found) / 2**20:.1f}",
        f"{peak / GIB:.2f} of {total / GIB:.2f}",
        f"{(weights + pages) / peak:.1%}",
    ]
    return cells, found


def measure(compiler: Programs, program: Any) -> Found:
    import jax

    begun = time.monotonic()
    made = compiler.build(program)
    seconds, memory = time.monotonic() - begun, made.memory_analysis()
    return Found(
        name="-".join(map(str, program.name)),
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        scratch=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        num_arguments=len(jax.tree_util.tree_leaves(program.args)),
        collectives=dict(Counter(COLLECTIVE.findall(made.as_text()))),
    )


def table(found: dict[str, tuple[list[str], list[Found]]]) -> str:
    lines = [
        "| model | on | weights, GiB | KV pages, GiB | longest request | scratch at most, MiB | peak, GiB | "
        "weights and pages of the peak |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {name} | {' | '.join(cells)} |" for name, (cells, _) in found.items()),
        "",
        "| model | program | arguments | compile, s | scratch, MiB | code, MiB | collectives (a layer's once) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (_, programs) in found.items():
        for program in programs:
            told = ", ".join(f"{count} {kind}" for kind, count in program.collectives.items()) or "none"
            lines.append(
                f"| {name} | {program.name} | {program.num_arguments} | {program.seconds:.1f} | "
                f"{program.scratch / 2**20:.1f} | {program.code / 2**20:.1f} | {told} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[[], *CASES], default=[], metavar="MODEL")
    parser.add_argument("--all", action="store_true", help="every program, not the largest alone")
    parser.add_argument("--write", action="store_true", help="put the table into docs/tpu.md")
    args = parser.parse_args()
    text = table({name: compile_case(name, args.all) for name in args.models or CASES})
    print(text)
    if args.write:
        page = PAGE.read_text()
        before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
        PAGE.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
