"""Keys, header limits, error bodies and probes."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import pytest

from engine.entrypoints.gate import OPEN_PATHS, hash_keys, is_authorized
from tests.engine.entrypoints.alphabet_engine import AlphabetEngine
from tests.engine.entrypoints.conftest import SETTINGS, App

BEARER = {"authorization": "Bearer secret-two"}


def api_paths(app: App) -> list[str]:
    return sorted(app.app.openapi()["paths"])


async def test_every_route_but_the_probes_needs_a_key(keyed_app: App) -> None:
    paths = [*api_paths(keyed_app), "/docs", "/openapi.json", "/nowhere", "//livez", "/livez/", "/LIVEZ", "/livez%2F"]
    assert len(paths) > 15
    for path in paths:
        for method in ("GET", "POST", "OPTIONS", "HEAD", "TRACE"):
            status = (await keyed_app.client.request(method, path)).status_code
            assert (status != 401) == (path in OPEN_PATHS), (method, path, status)


@pytest.mark.parametrize(
    "value", ["Bearer", "Bearer ", "Bearer wrong", "Basic secret-one", "secret-one", "bearer secret-one x", ""]
)
async def test_wrong_keys_are_refused(keyed_app: App, value: str) -> None:
    answer = await keyed_app.client.get("/v1/models", headers={"authorization": value})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_right_keys_are_taken(keyed_app: App) -> None:
    assert (await keyed_app.client.get("/v1/models", headers=BEARER)).status_code == 200
    assert (await keyed_app.client.get("/v1/models", headers={"authorization": "bearer secret-one"})).status_code == 200


def test_two_authorization_headers_are_refused() -> None:
    digests = hash_keys(["k"])
    header = (b"authorization", b"Bearer k")
    assert is_authorized([header], digests)
    assert not is_authorized([header, header], digests)


async def test_too_many_headers(app: App) -> None:
    answer = await app.client.get("/livez", headers={f"x-{i}": "v" for i in range(70)})
    assert answer.status_code == 431
    answer = await app.client.get("/livez", headers={"x": "v" * 40000})
    assert answer.status_code == 431


async def test_unknown_route_and_method(app: App) -> None:
    missing = await app.client.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    method = await app.client.get("/v1/completions")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_allowed")


async def test_body_limits() -> None:
    app = App(AlphabetEngine(), replace(SETTINGS, max_body_bytes=1000))
    answer = await app.client.post("/v1/completions", content=b" " * 1001)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")

    async def unsized() -> object:
        for _ in range(11):
            yield b" " * 100

    answer = await app.client.post("/v1/completions", content=unsized())
    assert answer.status_code == 413


async def test_a_bug_of_ours_is_answered_without_its_insides() -> None:
    class Broken(AlphabetEngine):
        async def generate(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            raise RuntimeError("/home/me/secret.py at 0x7f00deadbeef")
            yield

    app = App(Broken())
    for stream in (False, True):
        answer = await app.client.post("/v1/completions", json={"prompt": "a", "stream": stream})
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert error["code"] == "internal_error"
        assert answer.headers["x-request-id"] in error["message"]
        assert not re.search(r"/home|0x[0-9a-f]{6}|Traceback|RuntimeError|site-packages", answer.text)


async def test_probes_follow_the_engine_and_the_drain(app: App) -> None:
    for path in ("/livez", "/readyz", "/health", "/ping"):
        assert (await app.client.get(path)).status_code == 200
    app.app.state.serving.draining = True
    assert (await app.client.get("/readyz")).status_code == 503
    assert (await app.client.get("/livez")).status_code == 200
    app.app.state.serving.closed = True
    refused = await app.client.post("/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    app.app.state.serving.closed = app.app.state.serving.draining = False
    app.engine.is_alive = False
    for path in ("/readyz", "/health", "/ping"):
        assert (await app.client.get(path)).status_code == 503
    refused = await app.client.post("/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarted")


async def test_version_load_metrics(app: App) -> None:
    assert (await app.client.get("/version")).json()["version"]
    assert (await app.client.get("/load")).json() == {"server_load": 0}
    await app.client.get("/v1/models/letters")
    text = (await app.client.get("/metrics")).text
    assert 'http_requests_total{handler="/v1/models/{model_id:path}",method="GET",status="2xx"} 1.0' in text


async def test_a_silent_engine_is_not_ready() -> None:
    app = App(AlphabetEngine(), replace(SETTINGS, heartbeat_timeout=0.05))
    heart = asyncio.ensure_future(app.app.state.serving.watch_engine())

    async def becomes(status: int) -> None:
        async with asyncio.timeout(5):
            while (await app.client.get("/readyz")).status_code != status:
                await asyncio.sleep(0.01)

    await becomes(200)
    app.engine.frozen = True
    await becomes(503)
    assert (await app.client.get("/readyz")).json() == {"status": "engine does not answer"}
    app.engine.frozen = False
    await becomes(200)
    app.engine.is_alive = False
    await asyncio.wait_for(heart, 5)
    await becomes(503)


async def test_more_requests_than_allowed_are_refused() -> None:
    app = App(AlphabetEngine(step_s=0.01), replace(SETTINGS, max_open_requests=2))
    body = {"prompt": "a", "max_tokens": 10}
    answers = await asyncio.gather(*(app.client.post("/v1/completions", json=body) for _ in range(5)))
    assert sorted(a.status_code for a in answers) == [200, 200, 503, 503, 503]
    refused = next(a for a in answers if a.status_code == 503)
    assert refused.json()["error"]["code"] == "overloaded"
    assert refused.headers["retry-after"]
    assert (await app.client.post("/v1/completions", json=body)).status_code == 200


async def test_browsers_of_allowed_origins_get_through() -> None:
    settings = replace(SETTINGS, api_key=("k",), allowed_origins=("https://a.example",))
    app = App(AlphabetEngine(), settings)
    for origin, expected in (("https://a.example", 200), ("https://b.example", 400)):
        ask = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        answer = await app.client.options("/v1/completions", headers=ask)
        assert answer.status_code == expected
        assert ("access-control-allow-origin" in answer.headers) == (expected == 200)
        answer = await app.client.post("/v1/completions", headers={"origin": origin}, json={"prompt": "a"})
        assert answer.status_code == 401


async def test_root_path_is_not_part_of_the_route() -> None:
    app = App(AlphabetEngine(), replace(SETTINGS, api_key=("k",)))
    for path, status in (("/api/livez", 200), ("/api/v1/models", 401), ("/api/api/livez", 401)):
        scope = {
            "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "root_path": "/api",
            "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http", "server": None, "client": None,
        }  # fmt: skip
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request"}

        async def send(message: dict[str, object], sent: list[dict[str, object]] = sent) -> None:
            sent.append(message)

        await app.app(scope, receive, send)
        assert sent[0]["status"] == status, path
