"""Clients that leave, and an engine that dies, over a real socket."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
import pytest

from tests.engine.entrypoints.conftest import Server


def eventually(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.005)


@pytest.mark.parametrize("prompts", ["a", ["a", "b", "c"]])
def test_leaving_a_stream_aborts_its_requests(server: Server, prompts: object) -> None:
    body = {"prompt": prompts, "max_tokens": 4000, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        assert next(answer.iter_bytes())
        steps = server.engine.steps
    eventually(lambda: not server.engine.running)
    assert len(server.engine.aborted) == (1 if prompts == "a" else 3)
    assert server.engine.steps - steps < 60  # at 5 ms a step, far from the 4000 asked for
    assert httpx.get(f"{server.url}/load").json() == {"server_load": 0}


def test_leaving_a_whole_answer_aborts_its_request(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", timeout=0.2,
                   json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 4000})  # fmt: skip
    eventually(lambda: not server.engine.running)
    assert len(server.engine.aborted) == 1
    eventually(lambda: httpx.get(f"{server.url}/load").json() == {"server_load": 0})


def test_a_finished_stream_is_not_aborted(server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 5, "stream": True}
    text = httpx.post(f"{server.url}/v1/completions", json=body).text
    assert text.endswith("data: [DONE]\n\n")
    assert server.engine.aborted == []


def test_engine_death_is_a_503_or_an_error_event(server: Server) -> None:
    server.engine.dies_after = 3
    body = {"prompt": "a", "max_tokens": 50, "stream": True}
    events = httpx.post(f"{server.url}/v1/completions", json=body).text.split("\n\n")
    assert '"code":"engine_restarted"' in events[-3]
    assert events[-2] == "data: [DONE]"
    for stream in (False, True):
        answer = httpx.post(f"{server.url}/v1/completions", json=body | {"stream": stream})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_restarted"
    assert httpx.get(f"{server.url}/readyz").status_code == 503
    assert httpx.get(f"{server.url}/livez").status_code == 200
