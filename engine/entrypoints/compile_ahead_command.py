"""Arguments of `twinfer compile`; the work itself is compile_command.py's."""

from __future__ import annotations

import argparse

from engine.entrypoints.flags import add_flags, build_engine_config, engine_flags, read_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="checkpoint (default: the toy model)")
    ahead = parser.add_argument_group("compile")
    ahead.add_argument("-o", "--output", required=True, metavar="BUNDLE", help="the new folder to write")
    ahead.add_argument(
        "--tpu",
        metavar="SLICE",
        help="for a TPU that is not here: v5e, v6e, v5p, tpu7x, or a slice as v6e:2x4",
    )
    ahead.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="with --tpu: processes that compile at once (default: by cores and free memory)",
    )
    ahead.add_argument("--config", metavar="FILE", help="YAML with the options below, under the command line")
    add_flags(parser, engine_flags())


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace
    from pathlib import Path

    from engine.core.messages import StartupProgress
    from engine.entrypoints.compile_command import Where
    from engine.entrypoints.compile_command import run as build
    from engine.frontend.model import locate_model
    from engine.frontend.progress import StartupBar

    config = build_engine_config(read_values(args, engine_flags()))
    model = locate_model(replace(config, model=replace(config.model, load_format="dummy")))  # shapes are enough
    with StartupBar(shown=True) as bar:
        lines = build(
            config,
            model,
            Path(args.output),
            Where(args.tpu, args.jobs),
            lambda phase, done, total: bar.update(StartupProgress(phase, done, total)),
        )
    print("\n".join(lines))
    return 0
