"""Verdicts of the HTTP door on bad values are those of the bounds table, by name; nothing makes a 500."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from engine.entrypoints.fields import CHAT, COMPLETION, REFUSED, SAMPLING
from engine.errors import InvalidValue
from engine.params import BOUNDS, SamplingParams
from tests.engine.entrypoints.conftest import App

COMPLETION_BODY = {"prompt": "a", "max_tokens": 1}
CHAT_BODY = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
PROBES: list[Any] = [
    -1, 0, 1, 2, 16, 17, -2.1, 2.1, 100.5, 0.5, -0.0, 2**31 - 1, 2**31, 2**63, -(2**63) - 1, 1e308,
    "", "x", "x" * 300, True, False, [], [1], [-1], [2**31], ["a"], [""], ["a"] * 17, [True], {}, {"1": 5}, {"1": 101},
    {"x": 1}, [[]], [None],
]  # fmt: skip


def accepts(name: str, value: Any) -> bool:
    """Verdict of SamplingParams, the offline front door."""
    try:
        SamplingParams(**{"max_tokens": 1, "detokenize": True} | {name: value})
    except InvalidValue:
        return False
    return True


@pytest.mark.parametrize("name", sorted(set(SAMPLING) - {"logprobs", "max_tokens"}))
async def test_same_verdict_as_the_offline_door(app: App, name: str) -> None:
    for value in PROBES:
        offline = accepts(name, value)
        for path, body in (("/v1/completions", COMPLETION_BODY), ("/v1/chat/completions", CHAT_BODY)):
            answer = await app.client.post(
                path, content=orjson.dumps(body | {name: value}) if fits(value) else big(body, name, value)
            )
            assert (answer.status_code == 200) == offline, (name, value, answer.text)
            if not offline:
                assert answer.status_code == 400
                assert answer.json()["error"]["param"].startswith(name.split("[")[0][:4]), answer.text


def fits(value: Any) -> bool:
    return not isinstance(value, int) or isinstance(value, bool) or -(2**63) <= value < 2**64


def big(body: dict[str, Any], name: str, value: int) -> bytes:
    return orjson.dumps(body)[:-1] + f',"{name}":{value}}}'.encode()


def test_every_sampling_parameter_is_a_field() -> None:
    left_out = {"detokenize", "skip_reading_prefix_cache"}
    assert set(BOUNDS) - set(COMPLETION) == left_out
    assert set(BOUNDS) - set(CHAT) == left_out


@pytest.mark.parametrize("path,body", [("/v1/completions", COMPLETION_BODY), ("/v1/chat/completions", CHAT_BODY)])
async def test_null_is_the_same_as_absent(app: App, path: str, body: dict[str, Any]) -> None:
    table = COMPLETION if "prompt" in body else CHAT
    nulls = dict.fromkeys([*table, *REFUSED]) | body
    plain = await app.client.post(path, json=body)
    null = await app.client.post(path, json=nulls)
    assert null.status_code == 200, null.text
    assert null.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize("name", sorted(REFUSED))
async def test_known_but_unsupported_is_refused_by_name(app: App, name: str) -> None:
    answer = await app.client.post("/v1/chat/completions", json=CHAT_BODY | {name: "something"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert answer.json()["error"]["code"] == "unsupported"


async def test_harmless_values_of_unsupported_fields(app: App) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    harmless = {"tools": [tool], "tool_choice": "none", "response_format": {"type": "text"}, "use_beam_search": False}
    answer = await app.client.post("/v1/chat/completions", json=CHAT_BODY | harmless)
    assert answer.status_code == 200
    assert answer.json()["warnings"] == ["tools: ignored, as tool_choice is 'none'"]
    answer = await app.client.post("/v1/chat/completions", json=CHAT_BODY | {"tools": [tool]})
    assert answer.status_code == 400


async def test_unknown_field_names_the_nearest(app: App) -> None:
    answer = await app.client.post("/v1/completions", json=COMPLETION_BODY | {"temprature": 1})
    assert answer.status_code == 400
    assert "did you mean 'temperature'?" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body,code",
    [
        (b'{"prompt": "a", "prompt": "b"}', "invalid_json"),
        (b'{"prompt": "a", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "a", "temperature": -Infinity}', "invalid_json"),
        (b'{"prompt": "a", "temperature": 1e999}', "invalid_json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}", "invalid_json"),
        (b"[" * 200000, "invalid_json"),
        (b'{"a":' * 100000, "invalid_json"),
        (b'"text"', "invalid_json"),
        (b"", "invalid_json"),
        (b"\xff{}", "invalid_json"),
        (b'{"model": "gpt-4", "prompt": "a"}', "model_not_found"),
        (b'{"prompt": []}', "invalid_value"),
        (b'{"prompt": [[]]}', "invalid_value"),
        (b'{"prompt": [1, "a"]}', "invalid_value"),
        (b'{"prompt": ["a", 1]}', "invalid_value"),
        (b'{"prompt": 5}', "invalid_value"),
        (b"{}", "invalid_value"),
        (b'{"prompt": "a", "max_tokens": 0}', "invalid_value"),
        (b'{"prompt": "a", "stream_options": {"include_usage": true}}', "invalid_value"),
        (b'{"prompt": "a", "stream": true, "stream_options": {"usage": true}}', "invalid_value"),
        (b'{"prompt": "a", "stream": true, "prompt_logprobs": 1}', "unsupported"),
    ],
)
async def test_bad_completion_bodies(app: App, body: bytes, code: str) -> None:
    answer = await app.client.post("/v1/completions", content=body)
    assert answer.status_code == (404 if code == "model_not_found" else 400), answer.text
    assert answer.json()["error"]["code"] == code
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "hi", [1], [{}], [{"role": 1}], [{"role": "user", "content": 1}], [{"role": "user", "hue": 1}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "assistant", "tool_calls": [{}]}],
        [{"role": "user", "content": [1]}],
    ],
)  # fmt: skip
async def test_bad_messages(app: App, messages: Any) -> None:
    answer = await app.client.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages")


async def test_a_prompt_that_never_fits_is_a_400_in_a_stream_too(app: App) -> None:
    for stream in (False, True):
        answer = await app.client.post("/v1/completions", json={"prompt": "a" * 5000, "stream": stream})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
