"""The OpenAI routes over the alphabet engine: shapes, counts, and streamed text equal to whole text."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.engine.entrypoints.conftest import App

MESSAGES = [{"role": "user", "content": "hi"}]


async def post(app: App, path: str, **body: Any) -> Any:
    answer = await app.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def events(app: App, path: str, **body: Any) -> list[dict[str, Any]]:
    """The stream's events without [DONE], which must be last."""
    answer = await app.client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [orjson.loads(line) for line in lines[:-1]]


async def test_models(app: App) -> None:
    listed = (await app.client.get("/v1/models")).json()
    assert [m["id"] for m in listed["data"]] == ["letters", "alias"]
    assert (await app.client.get("/v1/models/alias")).json()["id"] == "alias"
    missing = await app.client.get("/v1/models/other")
    assert missing.status_code == 404
    assert "'letters'" in missing.json()["error"]["message"]


async def test_chat(app: App) -> None:
    answer = await post(app, "/v1/chat/completions", model="letters", messages=MESSAGES, max_tokens=3, n=2)
    assert answer["object"] == "chat.completion"
    assert [c["message"]["content"] for c in answer["choices"]] == ["ghi", "hij"]
    assert [c["finish_reason"] for c in answer["choices"]] == ["length", "length"]
    prompt = len("user:hi\nassistant:")
    assert answer["usage"]["prompt_tokens"] == prompt
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["total_tokens"] == prompt + 6


async def test_chat_logprobs(app: App) -> None:
    answer = await post(
        app, "/v1/chat/completions", messages=MESSAGES, max_completion_tokens=2, logprobs=True, top_logprobs=2
    )
    content = answer["choices"][0]["logprobs"]["content"]
    assert [e["token"] for e in content] == ["g", "h"]
    assert content[0]["bytes"] == [ord("g")]
    assert [t["token"] for t in content[0]["top_logprobs"]] == ["g", "h"]
    assert content[0]["logprob"] == -0.5


@pytest.mark.parametrize("n", [1, 3])
async def test_chat_stream_equals_whole(app: App, n: int) -> None:
    body = {"messages": MESSAGES, "max_tokens": 7, "n": n, "logprobs": True, "top_logprobs": 1}
    whole = await post(app, "/v1/chat/completions", **body)
    found = await events(app, "/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == whole["usage"]
    assert all(e["usage"] is None for e in found[:-1])
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in found[:-1] if e["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"]["content"] for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        streamed = [e for c in mine if c["logprobs"] for e in c["logprobs"]["content"]]
        assert streamed == choice["logprobs"]["content"]


async def test_completion_list_of_prompts_and_n(app: App) -> None:
    body = {"prompt": ["a", "m"], "max_tokens": 3, "n": 2}
    whole = await post(app, "/v1/completions", **body)
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in whole["choices"]] == ["tuv", "uvw", "fgh", "ghi"]
    assert whole["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 12,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    found = await events(app, "/v1/completions", **body)
    for choice in whole["choices"]:
        texts = [e["choices"][0]["text"] for e in found if e["choices"][0]["index"] == choice["index"]]
        assert "".join(texts) == choice["text"]


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_echo_with_logprobs(app: App, stream: bool) -> None:
    body = {"prompt": [[104, 105], [106]], "echo": True, "logprobs": 1, "max_tokens": 1}
    if stream:
        choices = [e["choices"][0] for e in await events(app, "/v1/completions", **body)]
        choices.sort(key=lambda c: c["index"])
    else:
        choices = (await post(app, "/v1/completions", **body))["choices"]
    assert [c["text"] for c in choices] == ["hib", "jc"]
    logprobs = choices[0]["logprobs"]
    assert logprobs["tokens"] == ["h", "i", "b"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [None, {"i": -0.5}, {"b": -0.5}]
    assert logprobs["text_offset"] == [0, 1, 2]


async def test_completion_echo_alone(app: App) -> None:
    body = {"prompt": "hi", "echo": True, "logprobs": 2, "max_tokens": 0}
    answer = await post(app, "/v1/completions", **body)
    assert answer["choices"][0]["text"] == "hi"
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5]
    assert answer["usage"]["completion_tokens"] == 0
    found = await events(app, "/v1/completions", **body, stream_options={"include_usage": True})
    assert found[0]["choices"][0]["text"] == "hi"
    assert found[0]["choices"][0]["logprobs"] == answer["choices"][0]["logprobs"]
    assert found[-1]["usage"] == answer["usage"]


async def test_token_id_switches(app: App) -> None:
    answer = await post(
        app, "/v1/completions", prompt="a", max_tokens=2, logprobs=1, return_token_ids=True,
        return_tokens_as_token_ids=True, prompt_logprobs=1,
    )  # fmt: skip
    choice = answer["choices"][0]
    assert choice["token_ids"] == [ord("t"), ord("u")]
    assert choice["prompt_token_ids"] == [ord("a")]
    assert choice["prompt_logprobs"] == [None]
    assert choice["logprobs"]["tokens"] == [f"token_id:{ord('t')}", f"token_id:{ord('u')}"]
    found = await events(app, "/v1/completions", prompt="a", max_tokens=2, return_token_ids=True)
    assert [e["choices"][0]["token_ids"] for e in found] == [[ord("t")], [ord("u")]]
    assert found[0]["choices"][0]["prompt_token_ids"] == [ord("a")]


async def test_continuous_usage(app: App) -> None:
    found = await events(
        app, "/v1/completions", prompt="ab", max_tokens=3,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    assert [e["usage"]["completion_tokens"] for e in found] == [1, 2, 3, 3]


async def test_content_parts_and_ignored_fields(app: App) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "user": "u", "metadata": {"a": "b"}}
    answer = await post(app, "/v1/chat/completions", **body)
    assert answer["warnings"] == ["user: accepted and ignored", "metadata: accepted and ignored"]
    assert answer["usage"]["prompt_tokens"] == len("user:h\ni\nassistant:")
    found = await events(app, "/v1/chat/completions", **body)
    assert found[0]["warnings"] == answer["warnings"]
    assert "warnings" not in found[1]


async def test_chat_echo_and_continue(app: App) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "so "}]
    body = {"messages": messages, "continue_final_message": True, "echo": True, "max_tokens": 2}
    whole = await post(app, "/v1/chat/completions", **body)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "so kl", "refusal": None}
    found = await events(app, "/v1/chat/completions", **body)
    assert "".join(e["choices"][0]["delta"]["content"] for e in found) == "so kl"


async def test_tokenize_and_detokenize(app: App) -> None:
    answer = await post(app, "/tokenize", prompt="hi", return_token_strs=True)
    assert answer == {"count": 2, "max_model_len": 4096, "tokens": [104, 105], "token_strs": ["h", "i"]}
    assert (await post(app, "/tokenize", messages=MESSAGES))["count"] == len("user:hi\nassistant:")
    assert await post(app, "/detokenize", tokens=[104, 105]) == {"prompt": "hi"}
