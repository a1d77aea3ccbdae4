"""`twinfer complete`: text continued by a running server, streamed to the terminal."""

from __future__ import annotations

import argparse
import asyncio
import sys

from engine.entrypoints.chat_command import add_client_arguments, client_of, read_line, sampling, show
from engine.entrypoints.flags import UsageError
from engine.entrypoints.http_client import ClientError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.quick is not None and not args.quick:
        raise UsageError("--quick: '' is not accepted; expected a text")
    client = client_of(args)
    model = args.model_name or asyncio.run(client.model_name())

    def complete(text: str) -> None:
        body = {"model": model, "prompt": text, "stream": True, **sampling(args)}
        body["stream_options"] = {"include_usage": True}
        asyncio.run(show(client.events("/v1/completions", body), args.stats))

    if args.quick is not None:
        complete(args.quick)
        return 0
    print(f"Text is continued by {model} at {client.base}. Ctrl-D ends; Ctrl-C stops an answer.", file=sys.stderr)
    while (text := read_line("> ")) is not None:
        if not text:
            continue
        try:
            complete(text)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
        except ClientError as error:
            print(f"twinfer: error: {error}", file=sys.stderr)
    return 0
