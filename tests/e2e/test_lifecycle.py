"""How servers start, end and die: one process each, fake backend."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.e2e.server import ROOT, ServerProcess, eventually

LONG: Any = {"prompt": "a", "stream": True, "ignore_eos": True}


class Reader:
    """Reads one stream in a thread."""

    def __init__(self, server: ServerProcess, max_tokens: int) -> None:
        self.events: list[Any] = []
        self.done = False
        self._url = f"{server.url}/v1/completions"
        self._body = LONG | {"max_tokens": max_tokens}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        eventually(lambda: self.events)

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line:
                    self.events.append(orjson.loads(line.removeprefix("data: ")))

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


Start = Callable[..., ServerProcess]


def twinfer(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "twinfer", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def keyed() -> Any:
    server = ServerProcess(["--backend", "fake"], {"TWINFER_API_KEY": "sesame"})
    yield server
    assert server.stop() == 0


def test_key_from_the_environment(keyed: ServerProcess) -> None:
    assert keyed.get("/readyz").status_code == 200
    assert keyed.get("/metrics").status_code == 401
    body = {"prompt": "a", "max_tokens": 1}
    assert keyed.post("/v1/completions", **body).status_code == 401
    answer = httpx.post(f"{keyed.url}/v1/completions", json=body, headers={"authorization": "Bearer sesame"})
    assert answer.status_code == 200
    done = twinfer("complete", "--url", keyed.url, "-q", "a", "--max-tokens", "2", TWINFER_API_KEY="sesame")
    assert done.returncode == 0, done.stderr
    assert "sesame" not in keyed.log()


def test_a_taken_port_is_told_in_one_line(keyed: ServerProcess) -> None:
    port = keyed.url.rsplit(":", 1)[1]
    done = twinfer("serve", "--backend", "fake", "--port", port)
    assert done.returncode == 1
    assert done.stderr == f"twinfer: error: --port: {port} is in use; choose another with --port\n"


def test_the_printed_curl_line_works(keyed: ServerProcess) -> None:
    curl = next(line for line in keyed.log().splitlines() if line.startswith("curl "))
    done = subprocess.run(
        ["bash", "-c", f"{curl} -s"], capture_output=True, env=os.environ | {"TWINFER_API_KEY": "sesame"}, timeout=30
    )
    assert orjson.loads(done.stdout)["object"] == "text_completion"


@pytest.mark.parametrize(
    "args,words",
    [
        (["./no-such-model"], "no-such-model"),
        (["--max-model-len", "999999"], "--max-model-len: 999999"),
        (["--host", "203.0.113.7", "--insecure-no-auth"], "--host: "),
    ],
)
def test_start_up_errors_are_one_line(args: list[str], words: str) -> None:
    done = twinfer("serve", "--backend", "fake", "--port", "0", *args)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("twinfer: error: ") and words in last
    assert "Traceback" not in done.stderr


def test_config_file_and_names(tmp_path: Path, start: Start) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("backend: fake\nserved-model-name: [one, two]\nmax-model-len: 64\nmax-logprobs: 3\n")
    server = start("--config", str(file))
    models = server.get("/v1/models").json()["data"]
    assert [m["id"] for m in models] == ["one", "two"]
    assert models[0]["max_model_len"] == 64
    refused = server.post("/v1/completions", prompt="a", logprobs=4)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
    assert server.post("/v1/completions", model="two", prompt="a", max_tokens=1).json()["model"] == "two"
    assert server.stop(signal.SIGINT) == 0


def test_drain_lets_streams_end_and_refuses_new_ones(start: Start) -> None:
    server = start("--backend", "fake", "--drain-delay", "0.2")
    reader = Reader(server, 1500)
    server.process.send_signal(signal.SIGTERM)
    eventually(lambda: server.get("/readyz").status_code == 503)
    assert server.get("/livez").status_code == 200
    eventually(lambda: server.post("/v1/completions", prompt="a", max_tokens=1).status_code == 503)
    reader.join()
    assert reader.done
    assert reader.events[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(10) == 0


def test_drain_timeout_ends_streams_with_an_error_event(start: Start) -> None:
    server = start("--backend", "fake", "--drain-timeout", "0.3")
    reader = Reader(server, 2000)
    assert server.stop() == 0
    reader.join()
    assert reader.events[-1]["error"]["code"] == "engine_restarted"


def test_a_second_signal_ends_at_once(start: Start) -> None:
    server = start("--backend", "fake")
    core = server.core()
    reader = Reader(server, 2000)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    begun = time.monotonic()
    server.stop(signal.SIGINT)
    assert time.monotonic() - begun < 8
    reader.join()
    eventually(lambda: not core.is_running() or core.status() == "zombie")


def test_a_stopped_and_a_dead_core_are_told(start: Start) -> None:
    server = start("--backend", "fake", "--heartbeat-timeout", "0.5")
    server.core().suspend()
    eventually(lambda: server.get("/readyz").status_code == 503)
    assert server.get("/livez").status_code == 200
    server.core().resume()
    eventually(lambda: server.get("/readyz").status_code == 200)
    readers = [Reader(server, 2000) for _ in range(3)]
    server.core().kill()
    for reader in readers:
        reader.join()
        assert reader.events[-1]["error"]["code"] == "engine_restarted"
    refused = server.post("/v1/completions", prompt="a")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarted")
    assert server.get("/readyz").status_code == 503
    assert server.get("/livez").status_code == 200
    assert server.stop() == 0
