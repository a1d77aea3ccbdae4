"""A small HTTP/1.1 client for our own commands: JSON calls and event streams over asyncio, no further package.

One connection a request (Connection: close). Knows http, https and unix:PATH; Content-Length and chunked bodies.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from engine.errors import TwinferError

MAX_LINE = 1 << 20


class ClientError(TwinferError):
    """The server cannot be reached, or answered with an error. `status` 0 = no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Client:
    """Calls to the server at `url` (with or without a trailing /v1)."""

    url: str
    api_key: str | None = None

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    async def get(self, path: str) -> Any:
        """The JSON answer. Raises ClientError."""
        return parse(await self._whole("GET", path, None))

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer. Raises ClientError."""
        return parse(await self._whole("POST", path, body))

    async def model_name(self) -> str:
        """The first model that the server names."""
        return str((await self.get("/v1/models"))["data"][0]["id"])

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream up to [DONE]. Raises ClientError, also for an error event."""
        async with self._answer("POST", path, body) as parts:
            buffer = b""
            async for part in parts:
                buffer += part
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    data = line.strip().removeprefix(b"data:").strip()
                    if not line.startswith(b"data:"):
                        continue
                    if data == b"[DONE]":
                        return
                    event = json.loads(data)
                    if "error" in event:
                        raise ClientError(str(event["error"].get("message", "the server failed")))
                    yield event

    async def _whole(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        async with self._answer(method, path, body) as parts:
            return b"".join([part async for part in parts])

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """The parts of a 2xx answer's body. Raises ClientError otherwise."""
        reader, writer, host, prefix = await self._connect()
        try:
            payload = b"" if body is None else json.dumps(body).encode()
            head = [f"{method} {prefix}{path} HTTP/1.1", f"Host: {host}", "Connection: close"]
            head += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
            if self.api_key:
                head.append(f"Authorization: Bearer {self.api_key}")
            writer.write("\r\n".join([*head, "", ""]).encode() + payload)
            await writer.drain()
            status, headers = await read_head(reader)
            parts = read_body(reader, headers)
            if not 200 <= status < 300:
                raise ClientError(error_text(b"".join([part async for part in parts]), status), status)
            try:
                yield parts
            finally:
                await parts.aclose()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            raise ClientError(f"the server at {self.base} closed the connection") from None
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str, str]:
        """(reader, writer, Host header, path prefix)."""
        try:
            if self.base.startswith("unix:"):
                reader, writer = await asyncio.open_unix_connection(self.base[len("unix:") :], limit=MAX_LINE)
                return reader, writer, "localhost", ""
            parts = urlsplit(self.base if "//" in self.base else f"http://{self.base}")
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ClientError(f"--url: {self.url!r} is not accepted; expected http://HOST:PORT")
            secure = parts.scheme == "https"
            port = parts.port or (443 if secure else 80)
            reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure or None, limit=MAX_LINE)
            return reader, writer, parts.netloc, parts.path
        except (OSError, ValueError) as error:
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise ClientError(f"no server at {self.base} ({reason}); start one with `twinfer serve`") from None


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """(status, headers with lower-case names)."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2 or not words[1].isdecimal():
        raise ClientError("the answer is not HTTP")
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return int(words[1]), {name.strip().lower(): value.strip() for name, value in pairs}


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncGenerator[bytes, None]:
    """The body's parts as they arrive."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while True:
            size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
            if size == 0:
                return
            yield (await reader.readexactly(size + 2))[:-2]  # + 2: the line end after the chunk
    left = int(headers["content-length"]) if "content-length" in headers else None
    while left is None or left > 0:
        part = await reader.read(1 << 16 if left is None else min(left, 1 << 16))
        if not part:
            return
        if left is not None:
            left -= len(part)
        yield part


def parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise ClientError("the server's answer is not JSON") from None


def error_text(body: bytes, status: int) -> str:
    """The message of an OpenAI error body, else the status."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {status}"
