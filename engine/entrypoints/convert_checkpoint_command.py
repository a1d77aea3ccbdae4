"""Arguments of `twinfer convert`; the work itself is convert_command.py's."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder, or ORG/NAME on the hub ('' = the toy model)")
    parser.add_argument("target", metavar="DST", help="the new folder to write")
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit on the hub")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from engine.core.messages import StartupProgress
    from engine.entrypoints.convert_command import run as convert
    from engine.frontend.hub import resolve_model
    from engine.frontend.progress import StartupBar

    source = resolve_model(args.source, args.revision)
    with StartupBar(shown=True) as bar:
        written = convert(
            source, Path(args.target), lambda phase, done, total: bar.update(StartupProgress(phase, done, total))
        )
    print(written)
    return 0
