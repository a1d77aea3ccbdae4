"""Collectives of a step over several chips that are not here: how many, how many bytes, beside the least that it needs.

    python -m bench.split [--write]                 prints the table, or puts it into docs/tpu.md
    python -m bench.split --one SLICE RANKS REPLICAS     one slice, as JSON (a process each: libtpu compiles one by one)

Four layers of Qwen3-0.6B, 64 rows, 256 tokens, compiled by libtpu. The least of a forward program of L layers over
ranks: 2 L + 1 all-reduces of the tokens' activations, three of a number a row for the likeliest id. Steps of 256 tokens
have a reduce-scatter and an all-gather in place of each of the former. Of the sampler what counts is that no table as
wide as the vocabulary moves. Static: nothing runs. Needs libtpu (pip install 'twinfer[tpu]').
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.collectives import Collective, collectives
from bench.shapes import QWEN3_06B

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tpu.md"
MARKS = ("<!-- bench.split -->", "<!-- /bench.split -->")
SLICES = (
    ("v6e:2x4", 8, 1), ("v6e:2x4", 4, 2), ("v6e:2x4", 1, 8), ("v5e:2x4", 8, 1), ("v5p:2x2x1", 4, 1),
    ("tpu7x:2x2x1", 8, 1), ("tpu7x:2x2x1", 4, 2),
)  # fmt: skip
LAYERS, ROWS, TOKENS = 4, 64, 256
SPLIT_TOKENS = 256
"""Said again, and not imported: a forward program of so many tokens is split between its products."""
BISECTIONS = 32  # turns of the sampler's loops


def measure(slice_name: str, ranks: int, replicas: int) -> dict[str, list[Collective]]:
    """Program -> its collectives, compiled in this process."""
    from backends.jax.build import Builder
    from backends.jax.compile import Programs
    from backends.jax.programs import ProgramSet
    from backends.jax.workspace import few_pages
    from engine.config import EngineConfig, ModelConfig, ParallelConfig, ScheduleConfig
    from engine.resolve import resolve
    from engine.specs.checkpoint import read_config
    from engine.specs.families import parse_config

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**QWEN3_06B, "num_hidden_layers": LAYERS}))
        arch = parse_config(read_config(Path(folder)))
    builder = Builder()
    config = EngineConfig(
        model=ModelConfig(load_format="dummy"),
        parallel=ParallelConfig(tensor_parallel_size=ranks, data_parallel_size=replicas),
        schedule=ScheduleConfig(max_num_seqs=ROWS, max_num_batched_tokens=TOKENS),
    )
    resolved = resolve(config, arch, builder.describe("auto", slice_name))
    builder.configure(resolved.runner)
    programs = ProgramSet(resolved.runner, few_pages(resolved.runner), builder.params, builder.split).programs()
    compiler, found = Programs(builder.split), {}
    for program in programs:
        if program.name in (("forward", ROWS), ("forward", TOKENS), ("sample", ROWS)):
            turns = LAYERS if program.name[0] == "forward" else BISECTIONS
            found["-".join(map(str, program.name))] = collectives(compiler.build(program).as_text(), turns)
    return found


def least(tokens: int, ranks: int) -> tuple[int, int]:
    """(how many, bytes) of collectives of a forward program."""
    if ranks == 1:
        return 0, 0
    sums, size, ids = 2 * LAYERS + 1, tokens * QWEN3_06B["hidden_size"] * 2, 3 * ROWS * 4
    if tokens < SPLIT_TOKENS:
        return sums + 3, sums * size + ids
    return 2 * sums + 3, sums * (size + size // ranks) + ids


def totals(found: list[dict[str, Any]]) -> tuple[int, int]:
    return sum(one["times"] for one in found), sum(one["times"] * one["num_bytes"] for one in found)


def in_process(slice_name: str, ranks: int, replicas: int) -> dict[str, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "bench.split", "--one", slice_name, str(ranks), str(replicas)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def table() -> str:
    lines = [
        "| on | ranks x replicas | forward, 64 tokens | forward, 256 tokens | least | sampler, 64 rows | its largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for slice_name, ranks, replicas in SLICES:
        found = in_process(slice_name, ranks, replicas)
        cells = [told(*totals(found[name])) for name in (f"forward-{ROWS}", f"forward-{TOKENS}")]
        floor = " and ".join(told(*least(tokens, ranks)) for tokens in (ROWS, TOKENS))
        sampler = found[f"sample-{ROWS}"]
        largest = max((one["num_bytes"] for one in sampler), default=0)
        lines.append(
            f"| {slice_name} | {ranks} x {replicas} | {' | '.join(cells)} | {floor} | {told(*totals(sampler))} | "
            f"{largest / 1024:.0f} KiB |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def told(count: int, num_bytes: int) -> str:
    return f"{count}, {num_bytes / 2**20:.2f} MiB" if count else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("SLICE", "RANKS", "REPLICAS"))
    parser.add_argument("--write", action="store_true", help="put the table into docs/tpu.md")
    args = parser.parse_args()
    if args.one is not None:
        slice_name, ranks, replicas = args.one
        found = measure(slice_name, int(ranks), int(replicas))
        fields = ("kind", "shapes", "num_bytes", "times")
        print(json.dumps({name: [{f: getattr(c, f) for f in fields} for c in all_] for name, all_ in found.items()}))
        return
    text = table()
    if args.write:
        page = PAGE.read_text()
        before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
        PAGE.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
