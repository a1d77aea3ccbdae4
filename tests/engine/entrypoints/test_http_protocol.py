"""Heads without end and clients that say nothing, over raw sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from engine.entrypoints.http_protocol import MAX_HEAD_BYTES, bounded_protocol
from tests.engine.entrypoints.alphabet_engine import AlphabetEngine
from tests.engine.entrypoints.conftest import Server

DEADLINE_S = 0.3


@pytest.fixture
def bounded() -> Iterator[Server]:
    server = Server(AlphabetEngine(), http=bounded_protocol(DEADLINE_S))
    yield server
    server.stop()


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def read_all(sock: socket.socket) -> bytes:
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize("begin", [b"GET /livez HTTP/1.1\r\nx: ", b"GET /", b"GET /livez HTTP/1.1\r\n"])
def test_an_endless_head_is_refused(bounded: Server, begin: bytes) -> None:
    filler = b"a: b\r\n" * 2000 if begin.endswith(b"\n") else b"a" * 12000
    with connect(bounded) as sock:
        sent = sock.send(begin)
        try:
            for _ in range(400):
                sent += sock.send(filler)
        except (BrokenPipeError, ConnectionResetError):
            pass
        else:
            raise AssertionError(f"{sent} bytes were taken")
    assert sent > MAX_HEAD_BYTES


def test_a_long_head_is_told_so(bounded: Server) -> None:
    with connect(bounded) as sock:
        sock.send(b"GET /livez HTTP/1.1\r\nx: " + b"a" * MAX_HEAD_BYTES)
        assert read_all(sock).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("begin", [b"", b"GET /livez HTT", b"GET /livez HTTP/1.1\r\nhost: a\r\n"])
def test_a_silent_client_is_closed(bounded: Server, begin: bytes) -> None:
    with connect(bounded) as sock:
        sock.send(begin)
        begun = time.monotonic()
        assert read_all(sock) == b""
        assert 0.5 * DEADLINE_S < time.monotonic() - begun < 10 * DEADLINE_S


def test_a_kept_connection_has_a_deadline_for_every_head(bounded: Server) -> None:
    whole = b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n"
    with connect(bounded) as sock:
        for _ in range(3):
            sock.send(whole)
            answer = b""
            while not answer.endswith(b"}"):
                answer += sock.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            time.sleep(1.5 * DEADLINE_S)  # idle between requests is the keep-alive timer's business
        sock.send(whole[:10])
        assert read_all(sock) == b""


def test_a_large_body_is_no_head(bounded: Server) -> None:
    body = b'{"prompt": "' + b"a" * 4 * MAX_HEAD_BYTES + b'"}'
    with connect(bounded) as sock:
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
