"""`twinfer chat`: a conversation with a running server, streamed to the terminal."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from engine import env
from engine.entrypoints.flags import UsageError
from engine.entrypoints.http_client import Client, ClientError

DEFAULT_URL = "http://127.0.0.1:8000/v1"


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    """What chat and complete share."""
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the server [{DEFAULT_URL}]")
    parser.add_argument("--model-name", metavar="TEXT", help="model to ask for (default: the server's first)")
    parser.add_argument("--api-key", metavar="TEXT", help="key; better given as TWINFER_API_KEY")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="send this one text, print the answer and end")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 = always the most likely token")
    parser.add_argument("--stats", action="store_true", help="print time to first token and tokens per second")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    parser.add_argument("--system-prompt", metavar="TEXT", help="first message of the conversation")


@dataclass(slots=True)
class Timing:
    """When the tokens of one answer came."""

    begun: float
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def note(self, event: dict[str, Any]) -> None:
        usage = event.get("usage")
        if usage:
            self.tokens = usage["completion_tokens"]
        if event.get("choices"):
            self.last = time.monotonic()
            self.first = self.first or self.last

    def text(self) -> str:
        if self.first is None:
            return "no tokens"
        speed = ""
        if self.tokens > 1 and self.last > self.first:
            speed = f", {(self.tokens - 1) / (self.last - self.first):.1f} tokens/s"
        return f"first token after {(self.first - self.begun) * 1000:.0f} ms, {self.tokens} tokens{speed}"


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    given = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    return {name: value for name, value in given.items() if value is not None}


def client_of(args: argparse.Namespace) -> Client:
    return Client(args.url, args.api_key or env.read("TWINFER_API_KEY"))


async def show(events: AsyncIterator[dict[str, Any]], stats: bool) -> str:
    """Print an answer's text as it comes; returns it."""
    timing = Timing(time.monotonic())
    texts = []
    async for event in events:
        timing.note(event)
        for choice in event.get("choices", ()):
            text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            texts.append(text or "")
            sys.stdout.write(text or "")
            sys.stdout.flush()
    print()
    if stats:
        print(f"({timing.text()})", file=sys.stderr)
    return "".join(texts)


def read_line(prompt: str) -> str | None:
    """A line of the user; None at the end of input."""
    try:
        return input(prompt)
    except EOFError:
        print()
        return None


def run(args: argparse.Namespace) -> int:
    if args.quick is not None and not args.quick:
        raise UsageError("--quick: '' is not accepted; expected a text")
    client = client_of(args)
    model = args.model_name or asyncio.run(client.model_name())
    messages: list[dict[str, str]] = []
    if args.system_prompt:
        messages.append({"role": "system", "content": args.system_prompt})

    def ask(text: str) -> None:
        messages.append({"role": "user", "content": text})
        body = {"model": model, "messages": messages, "stream": True, **sampling(args)}
        body["stream_options"] = {"include_usage": True}
        answer = asyncio.run(show(client.events("/v1/chat/completions", body), args.stats))
        messages.append({"role": "assistant", "content": answer})

    if args.quick is not None:
        ask(args.quick)
        return 0
    import readline  # noqa: F401  line editing and history for input()

    print(f"Talking to {model} at {client.base}. Ctrl-D ends; Ctrl-C stops an answer.", file=sys.stderr)
    while (text := read_line("> ")) is not None:
        if not text.strip():
            continue
        try:
            ask(text)
        except KeyboardInterrupt:
            messages.pop()
            print("\n(stopped; the question is taken back)", file=sys.stderr)
        except ClientError as error:
            messages.pop()
            print(f"twinfer: error: {error}", file=sys.stderr)
    return 0
