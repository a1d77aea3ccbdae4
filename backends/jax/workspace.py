"""What a step takes of a device beside weights and KV pages: told by the compiler, not guessed.

On a TPU or GPU the programs that need most are compiled once with a handful of pages, since no program's scratch grows
with the number of pages, and asked for their memory. A CPU shares the host's memory and takes a formula's estimate
(ProgramSet.workspace_bytes). Called by the runner and by `twinfer compile` before pages are counted.
"""

from __future__ import annotations

from typing import Any

import jax

from backends.jax.compile import Program, text_of
from backends.jax.programs import ProgramSet
from backends.jax.split import Split
from engine.runner import Measure, RunnerConfig
from engine.specs.cache import CacheLayout, GroupLayout, PoolLayout, cache_groups

IN_FLIGHT_LOGITS = 2  # of the step that runs and of the one that is sampled


def workspace_bytes(config: RunnerConfig, params: dict[str, Any], split: Split, measure: Measure | None = None) -> int:
    """On one device. Compiles a few programs where it is no CPU, or has them measured elsewhere."""
    if split.platform == "cpu":
        return ProgramSet.workspace_bytes(config)
    made = ProgramSet(config, few_pages(config), params, split)
    programs = {program.name: program for program in made.programs()}
    rows, tokens = made.shape(max(config.row_buckets)).rows, max(config.token_buckets)
    wanted = {("forward", made.shape(tokens).tokens), ("forward", made.shape(rows).tokens), ("sample", rows)}
    wanted.add(("turns", made.shape(rows).tokens))
    names = sorted(text_of(name) for name in wanted & set(programs))
    by_text = {text_of(name): program for name, program in programs.items()}
    sizes = [measured(made, by_text[name]) for name in names] if measure is None else measure(names)
    most, code = (max(column) for column in zip(*sizes, strict=True))
    logits = bytes_of(made.logits(rows))
    hidden = tokens * config.arch.hidden_size * 4
    results = made.held_bytes() or IN_FLIGHT_LOGITS * (logits + hidden)
    return most + code * len(programs) + tables_of(programs) + results


def measured(made: ProgramSet, program: Program) -> tuple[int, int]:
    """(scratch, code) bytes."""
    memory = made.build(program).memory_analysis()
    return int(memory.temp_size_in_bytes), int(memory.generated_code_size_in_bytes)


def few_pages(config: RunnerConfig) -> CacheLayout:
    """A layout that programs can be compiled for before pages are counted."""
    groups = cache_groups(config.arch)
    heads = [max(1, group.num_kv_heads // config.tensor_size) for group in groups]
    return CacheLayout(
        groups=tuple(
            GroupLayout(spec=group, pool=index, page_tokens=page)
            for index, (group, page) in enumerate(zip(groups, config.page_tokens, strict=True))
        ),
        pools=tuple(
            PoolLayout(
                num_pages=8,
                page_bytes=0,
                num_layers=len(group.layers),
                num_kv_heads=count,
                head_size=group.head_size,
                page_tokens=page,
            )
            for group, count, page in zip(groups, heads, config.page_tokens, strict=True)
        ),
        kv_dtype=config.kv_dtype,
    )


def tables_of(programs: dict[Any, Program]) -> int:
    """Bytes of the rows and sampling tables: arguments of the program that opens rows."""
    rows, tables = programs["open",].args[:2]
    return sum(bytes_of(leaf) for leaf in jax.tree_util.tree_leaves((rows, tables)))


def bytes_of(shape: Any) -> int:
    """On one device."""
    sharding = getattr(shape, "sharding", None)
    part = shape.shape if sharding is None else sharding.shard_shape(shape.shape)
    size = shape.dtype.itemsize
    for side in part:
        size *= side
    return int(size)
