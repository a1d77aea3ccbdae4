"""`twinfer bench latency`: how long one batch takes, offline, from prompts in to last token out."""

from __future__ import annotations

import argparse

from engine.entrypoints.flags import UsageError, add_flags, engine_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="checkpoint (default: the toy model)")
    bench = parser.add_argument_group("bench")
    bench.add_argument("--input-len", type=int, default=32, metavar="N", help="prompt tokens [32]")
    bench.add_argument("--output-len", type=int, default=128, metavar="N", help="tokens to generate [128]")
    bench.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences at once [8]")
    bench.add_argument("--num-iters-warmup", type=int, default=2, metavar="N", help="batches before the clock [2]")
    bench.add_argument("--num-iters", type=int, default=5, metavar="N", help="batches timed [5]")
    bench.add_argument("--output-json", metavar="FILE", help="write the figures")
    bench.add_argument("--config", metavar="FILE", help="YAML with the options below")
    add_flags(parser, engine_flags())


def run(args: argparse.Namespace) -> int:
    for name in ("input_len", "output_len", "batch_size", "num_iters"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: {getattr(args, name)} is not accepted; expected >= 1")
    from engine.entrypoints.bench_offline import latency

    return latency(args)
