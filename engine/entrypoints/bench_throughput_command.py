"""`twinfer bench throughput`: tokens per second over many prompts at once, offline."""

from __future__ import annotations

import argparse

from engine.entrypoints.flags import UsageError, add_flags, engine_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="checkpoint (default: the toy model)")
    bench = parser.add_argument_group("bench")
    bench.add_argument("--dataset-name", choices=("random", "custom"), default="random", help="[random]")
    bench.add_argument("--dataset-path", metavar="FILE", help="jsonl of the custom dataset")
    bench.add_argument("--num-prompts", type=int, default=100, metavar="N", help="[100]")
    bench.add_argument("--input-len", type=int, default=128, metavar="N", help="prompt tokens [128]")
    bench.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens to generate [64]")
    bench.add_argument("--random-range-ratio", type=float, default=0.0, metavar="X", help="spread of lengths [0]")
    bench.add_argument("--prefix-len", type=int, default=0, metavar="N", help="tokens shared by all prompts [0]")
    bench.add_argument("--output-json", metavar="FILE", help="write the figures")
    bench.add_argument("--config", metavar="FILE", help="YAML with the options below")
    add_flags(parser, engine_flags())


def run(args: argparse.Namespace) -> int:
    for name in ("input_len", "output_len", "num_prompts"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: {getattr(args, name)} is not accepted; expected >= 1")
    if not 0 <= args.random_range_ratio < 1:
        raise UsageError(f"--random-range-ratio: {args.random_range_ratio} is not accepted; expected 0 <= X < 1")
    if (args.dataset_name == "custom") != (args.dataset_path is not None):
        raise UsageError("--dataset-path: needed with, and only with, --dataset-name custom")
    from engine.entrypoints.bench_offline import throughput

    return throughput(args)
