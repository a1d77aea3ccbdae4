"""resolve_model against a fake hub on localhost: what is asked for, what is fetched, and how each failure reads."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from engine.errors import ConfigError, StartupError
from engine.frontend.hub import resolve_model

MAIN = "a" * 40
OLD = "b" * 40
ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights of main",
    "pytorch_model.bin": b"a pickle",
    "tokenizer.model": b"a protobuf",
    "modeling_evil.py": b"raise SystemExit",
    "original/config.json": b"{}",
    "consolidated.safetensors": b"twice",
}


@dataclass
class FakeHub:
    """Serves the part of the hub's HTTP API that a snapshot needs, and remembers each request."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    requests: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    gated: bool = False

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(path.split("?")[0]).strip("/").split("/")
        gone = (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        if repo != "org/tiny":
            return gone
        if rest[0] == "resolve" and self.gated and token is None:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b"{}"
        revision = rest[1] if len(rest) > 1 else "main"
        commit = {"main": MAIN, MAIN: MAIN, "v1": OLD, OLD: OLD}.get(revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}"
        if rest[0] == "revision":
            return 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": []}).encode()
        if rest[0] == "tree":
            listing = [{"type": "file", "path": n, "size": len(d), "oid": sha1(d)} for n, d in self.files.items()]
            return 200, {}, json.dumps(listing).encode()
        data = self.files["/".join(rest[2:])]
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{sha1(data)}"'}, data


def sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    state = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            token = self.headers.get("Authorization")
            state.requests.append(f"{self.command} {self.path}")
            state.tokens.append(token)
            status, headers, body = state.answer(self.path, token)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


def test_fetches_only_what_is_used(hub: FakeHub, tmp_path: Path) -> None:
    folder = resolve_model("org/tiny", download_dir=str(tmp_path), endpoint=hub.url)
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert found == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
    }
    assert (folder / "model.safetensors").read_bytes() == b"weights of main"


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_pinned_revision_reaches_every_request(hub: FakeHub, tmp_path: Path, revision: str) -> None:
    folder = resolve_model("org/tiny", revision, download_dir=str(tmp_path), endpoint=hub.url)
    assert folder.name == OLD
    assert hub.requests
    for request in hub.requests:
        assert f"/{OLD}" in request or f"/revision/{revision}" in request, request
    assert sum("/resolve/" in request for request in hub.requests) >= 5


def test_commit_in_cache_needs_no_network(hub: FakeHub, tmp_path: Path) -> None:
    first = resolve_model("org/tiny", OLD, download_dir=str(tmp_path), endpoint=hub.url)
    hub.requests.clear()
    assert resolve_model("org/tiny", OLD, download_dir=str(tmp_path), endpoint=hub.url) == first
    assert resolve_model("org/tiny", OLD, download_dir=str(tmp_path), endpoint=hub.url, offline=True) == first
    assert hub.requests == []


def test_token_is_sent(hub: FakeHub, tmp_path: Path) -> None:
    hub.gated = True
    with pytest.raises(StartupError, match=r"org/tiny: gated; accept its licence .*HF_TOKEN"):
        resolve_model("org/tiny", download_dir=str(tmp_path), endpoint=hub.url)
    hub.tokens.clear()
    resolve_model("org/tiny", token="hf_secret", download_dir=str(tmp_path), endpoint=hub.url)
    assert set(hub.tokens) == {"Bearer hf_secret"}


def test_tokenizer_alone_leaves_weights_out(hub: FakeHub, tmp_path: Path) -> None:
    folder = resolve_model("org/tiny", download_dir=str(tmp_path), endpoint=hub.url, weights=False)
    assert (folder / "tokenizer.json").exists() and not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("org/absent", None, "org/absent: not found on the hub"),
        ("org/tiny", "v9", "org/tiny at revision v9: the repository has no such revision"),
    ],
)
def test_not_found(hub: FakeHub, tmp_path: Path, name: str, revision: str | None, message: str) -> None:
    with pytest.raises(StartupError, match=message) as caught:
        resolve_model(name, revision, download_dir=str(tmp_path), endpoint=hub.url)
    assert "\n" not in str(caught.value)


def test_pickles_only(hub: FakeHub, tmp_path: Path) -> None:
    for name in ("model.safetensors", "consolidated.safetensors"):
        del hub.files[name]
    with pytest.raises(StartupError, match=r"no \*\.safetensors; convert"):
        resolve_model("org/tiny", download_dir=str(tmp_path), endpoint=hub.url)


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="hub cannot be reached; check the network or HF_ENDPOINT") as caught:
        resolve_model("org/tiny", download_dir=str(tmp_path), endpoint="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)


def test_offline_and_absent(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="offline; run once with network"):
        resolve_model("org/tiny", download_dir=str(tmp_path), offline=True)


def test_environment_is_honoured(hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, which huggingface_hub reads once when it is imported."""
    code = (
        "from engine.frontend.hub import resolve_model as r\ntry: print(r('org/tiny'))\nexcept Exception as e: print(e)"
    )

    def outcome(**more: str) -> str:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), **more}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip()

    assert "offline; run once with network, or unset HF_HUB_OFFLINE" in outcome(HF_HUB_OFFLINE="1")
    assert hub.requests == []
    folder = outcome()
    assert Path(folder).parent.parent.parent.parent == tmp_path.resolve()
    assert outcome(HF_HUB_OFFLINE="1") == folder


def test_local_names(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match="--revision: 'main' needs a hub name"):
        resolve_model(str(tmp_path), "main")
    (tmp_path / "model.gguf").write_bytes(b"")
    for name, message in [
        (str(tmp_path / "model.gguf"), "a file; give the folder"),
        ("./absent", "no such folder"),
        ("/absent/model", "no such folder"),
        ("a/b/c", "no such folder"),
        ("org/", "neither a folder here nor a hub name"),
        ("org/na me", "neither a folder here nor a hub name"),
        ("org/x..y", "neither a folder here nor a hub name"),
    ]:
        with pytest.raises(StartupError, match=message):
            resolve_model(name)
