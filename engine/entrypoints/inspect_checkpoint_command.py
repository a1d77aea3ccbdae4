"""Arguments of `twinfer inspect`; the report itself is inspect_command.py's."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a folder, or ORG/NAME on the hub ('' = the toy model)"
    )
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--tensor-parallel-size", "-tp", type=int, default=1, metavar="N", help="devices to show shards for [1]"
    )


def run(args: argparse.Namespace) -> int:
    from engine.entrypoints.inspect_command import run as report
    from engine.frontend.hub import resolve_model

    print(report(resolve_model(args.checkpoint, args.revision), args.tensor_parallel_size), end="")
    return 0
