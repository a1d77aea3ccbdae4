"""Listening: taken ports, wrong addresses, UNIX sockets; what start-up prints."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from engine.core.messages import CoreReady
from engine.entrypoints.http_server import bind, check_tls, url_of
from engine.entrypoints.serve import banner
from engine.entrypoints.settings import ServerSettings
from engine.errors import StartupError

READY = CoreReady(
    max_model_len=64, vocab_size=9, num_pages=4, page_tokens=16, kv_tokens=64, max_logprobs=5, backend="fake",
    device="none", dtype="float32", startup_s={"load": 1.0, "warm_up": 0.5}, backend_reason="as asked",
    notes=["a note"],
)  # fmt: skip


def test_a_taken_port() -> None:
    with bind(ServerSettings(port=0)) as first:
        first.listen()
        with pytest.raises(StartupError, match="is in use; choose another with --port"):
            bind(ServerSettings(port=first.getsockname()[1]))
        assert url_of(ServerSettings(host="0.0.0.0"), first) == f"http://127.0.0.1:{first.getsockname()[1]}"


def test_addresses_that_are_not_ours() -> None:
    with pytest.raises(StartupError, match=r"--host: cannot listen on 203\.0\.113\.7"):
        bind(ServerSettings(host="203.0.113.7", port=0))
    with pytest.raises(StartupError, match="is not an address of this machine"):
        bind(ServerSettings(host="no such host", port=0))


def test_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s"
    settings = ServerSettings(uds=str(path))
    bind(settings).close()  # leaves its file behind, as a killed server does
    with bind(settings) as again:
        assert again.family == socket.AF_UNIX
        assert path.stat().st_mode & 0o777 == 0o600
    precious = tmp_path / "file"
    precious.write_text("kept")
    with pytest.raises(StartupError, match="--uds: cannot listen on"):
        bind(ServerSettings(uds=str(precious)))
    assert precious.read_text() == "kept"


def test_tls_files_that_cannot_be_used(tmp_path: Path) -> None:
    check_tls(ServerSettings())
    good, missing = tmp_path / "c.pem", str(tmp_path / "none.pem")
    good.write_text("no certificate")
    with pytest.raises(StartupError, match="--ssl-keyfile: cannot read"):
        check_tls(ServerSettings(ssl_certfile=str(good), ssl_keyfile=missing))
    with pytest.raises(StartupError, match="--ssl-certfile: certificate and key cannot be used"):
        check_tls(ServerSettings(ssl_certfile=str(good), ssl_keyfile=str(good)))


def test_banner() -> None:
    lines = banner(READY, "it's", "http://h:1", ServerSettings(api_key=("k",))).splitlines()
    assert "backend fake (as asked) | device none | model it's | float32 | 64 KV tokens | ready in 1.5 s" in lines[0]
    assert " s, 0 compiled | http://h:1" in lines[0]
    assert lines[1] == "note: a note"
    assert lines[2].startswith("curl http://h:1/v1/completions ")
    assert "Bearer $TWINFER_API_KEY" in lines[2] and "it'\\''s" in lines[2]
