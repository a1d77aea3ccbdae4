"""The openai SDK against a real server process: shapes, streams equal to whole answers, logprobs, errors, metrics."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.e2e.server import ServerProcess, eventually

MESSAGES: Any = [{"role": "user", "content": "Write a function that adds two numbers."}]
PROMPT = "def add(a, b):\n"


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)


def test_models(server: ServerProcess) -> None:
    models = list(server.client.models.list())
    assert [m.id for m in models] == ["default"]
    assert server.client.models.retrieve("default").id == "default"


def test_chat(server: ServerProcess) -> None:
    answer = server.client.chat.completions.create(model="default", messages=MESSAGES, max_tokens=12, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = server.client.chat.completions.create(model="default", messages=MESSAGES, max_tokens=12, temperature=0)
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert again.id != answer.id


@pytest.mark.parametrize("n", [1, 3])
def test_chat_stream_equals_whole(server: ServerProcess, n: int) -> None:
    options: Any = {"messages": MESSAGES, "max_tokens": 40, "temperature": 1, "seed": 7, "n": n}
    whole = server.client.chat.completions.create(model="default", **options)
    chunks = list(
        server.client.chat.completions.create(
            model="default", stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        assert text_of(chunks, choice.index) == choice.message.content
        reasons = [c.finish_reason for k in chunks for c in k.choices if c.index == choice.index and c.finish_reason]
        assert reasons == [choice.finish_reason]
    if n > 1:
        assert len({c.message.content for c in whole.choices}) > 1


def test_chat_logprobs(server: ServerProcess) -> None:
    answer = server.client.chat.completions.create(
        model="default", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=4
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert len(content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    for entry in content:
        assert len(entry.top_logprobs) == 4
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy: the chosen one is the most likely
        assert entry.logprob <= 0
        ranked = [t.logprob for t in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)


def test_completion_of_text_and_of_ids_is_the_same(server: ServerProcess) -> None:
    ids = server.post("/tokenize", prompt=PROMPT).json()["tokens"]
    answers = [
        server.client.completions.create(model="default", prompt=prompt, max_tokens=8, temperature=0)
        for prompt in (PROMPT, ids, [PROMPT], [ids])
    ]
    assert len({a.choices[0].text for a in answers}) == 1
    assert {a.usage.prompt_tokens for a in answers if a.usage} == {len(ids)}
    assert server.post("/detokenize", tokens=ids).json()["prompt"] == PROMPT


def test_list_of_prompts_with_n(server: ServerProcess) -> None:
    prompts = [PROMPT, "class Stack:\n", "import "]
    options: Any = {"model": "default", "max_tokens": 6, "temperature": 1, "seed": 3, "n": 2}
    whole = server.client.completions.create(prompt=prompts, **options)
    assert [c.index for c in whole.choices] == list(range(6))
    texts = [""] * 6
    for chunk in server.client.completions.create(prompt=prompts, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in whole.choices]
    alone = server.client.completions.create(prompt=prompts[1], **options)
    assert [c.text for c in alone.choices] == texts[2:4]


def test_stop_strings_cut_streams_and_whole_answers_alike(server: ServerProcess) -> None:
    options: Any = {"model": "default", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    free = server.client.completions.create(**options).choices[0].text
    for begin in range(1, len(free) - 3, 5):
        stop = free[begin : begin + 3]
        expected = free[: free.index(stop)]
        whole = server.client.completions.create(stop=stop, **options).choices[0]
        assert (whole.text, whole.finish_reason) == (expected, "stop")
        chunks = server.client.completions.create(stop=[stop], stream=True, **options)
        assert "".join(c.choices[0].text for c in chunks) == expected


def test_streams_cut_inside_characters_lose_nothing(server: ServerProcess) -> None:
    """Random tokens out of the bytes of a few long characters: mostly broken UTF-8."""
    ids = server.post("/tokenize", prompt="é日🎈 ä", add_special_tokens=False).json()["tokens"]
    for seed in range(4):
        body = {"prompt": PROMPT, "max_tokens": 60, "allowed_token_ids": ids, "temperature": 3, "seed": seed}
        whole = server.post("/v1/completions", **body).json()["choices"][0]["text"]
        chunks = server.client.completions.create(
            model="default", prompt=PROMPT, max_tokens=60, temperature=3, seed=seed, stream=True,
            extra_body={"allowed_token_ids": ids},
        )  # fmt: skip
        assert "".join(c.choices[0].text for c in chunks) == whole
        assert "é" in whole or "日" in whole or "�" in whole


def scored(server: ServerProcess, ids: list[int], max_tokens: int) -> Any:
    """As lm-eval asks: token ids, echo, logprobs 1."""
    answer = server.client.completions.create(
        model="default", prompt=[ids], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1234
    )
    return answer.choices[0]


def test_lm_eval_shape(server: ServerProcess) -> None:
    """Scores of generated tokens, read back as prompt logprobs, are those they were generated with."""
    made = server.post(
        "/v1/completions", prompt=PROMPT, max_tokens=12, temperature=0, ignore_eos=True, logprobs=1,
        return_token_ids=True,
    ).json()["choices"][0]  # fmt: skip
    context, continuation = made["prompt_token_ids"], made["token_ids"]
    with_one = scored(server, context + continuation, 1)
    alone = scored(server, context + continuation, 0)
    size = len(context) + len(continuation)
    assert len(with_one.logprobs.tokens) == size + 1
    assert len(alone.logprobs.tokens) == size
    assert with_one.logprobs.token_logprobs[:-1] == pytest.approx(alone.logprobs.token_logprobs, abs=1e-5)
    assert alone.logprobs.token_logprobs[0] is None and alone.logprobs.top_logprobs[0] is None
    again = with_one.logprobs.token_logprobs[len(context) : -1]
    assert again == pytest.approx(made["logprobs"]["token_logprobs"], abs=1e-3)
    for value, top in zip(again, with_one.logprobs.top_logprobs[len(context) : -1], strict=True):
        assert value == pytest.approx(max(top.values()), abs=1e-6)  # greedy: lm-eval's is_greedy holds
    assert alone.text == server.post("/detokenize", tokens=context + continuation).json()["prompt"]
    assert "".join(alone.logprobs.tokens[:3]) == alone.text[: alone.logprobs.text_offset[3]]


def test_sampling_fields_reach_the_engine(server: ServerProcess) -> None:
    ids = server.post("/tokenize", prompt=" return", add_special_tokens=False).json()["tokens"]
    allowed = server.post(
        "/v1/completions", prompt=PROMPT, max_tokens=3, allowed_token_ids=ids[:1], return_token_ids=True
    )
    assert allowed.json()["choices"][0]["token_ids"] == ids[:1] * 3
    biased = server.post(
        "/v1/completions",
        prompt=PROMPT,
        max_tokens=2,
        temperature=0,
        logit_bias={str(ids[0]): 100},
        return_token_ids=True,
    )
    assert biased.json()["choices"][0]["token_ids"] == ids[:1] * 2
    stopped = server.post(
        "/v1/completions", prompt=PROMPT, max_tokens=9, allowed_token_ids=ids[:1], stop_token_ids=ids[:1]
    )
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"
    assert stopped.json()["choices"][0]["stop_reason"] == ids[0]
    cut = server.post("/v1/completions", prompt=PROMPT, max_tokens=1, truncate_prompt_tokens=2)
    assert cut.json()["usage"]["prompt_tokens"] == 2


def test_errors_name_the_field(server: ServerProcess) -> None:
    create = server.client.chat.completions.create
    cases: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None, str]] = [
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "'default'"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", ">= 0"),
        ({"top_logprobs": 21, "logprobs": True}, openai.BadRequestError, "top_logprobs", "at most 20"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            openai.BadRequestError,
            "tools",
            "not supported",
        ),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", "text"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "'temperature'"),
        ({"logit_bias": {"999999": 1}}, openai.BadRequestError, "logit_bias", "4096"),
        ({"messages": [{"role": "user", "content": "x " * 5000}]}, openai.BadRequestError, "prompt", "do not fit"),
    ]
    for change, kind, param, words in cases:
        for stream in (False, True):
            with pytest.raises(kind) as caught:
                create(**({"model": "default", "messages": MESSAGES, "stream": stream} | change))
            assert words in caught.value.message
            if param is not None:
                assert caught.value.param == param
    assert server.get("/readyz").status_code == 200


def test_concurrent_streams_do_not_mix(server: ServerProcess) -> None:
    def one(i: int, stream: bool) -> str:
        options: Any = {"model": "default", "prompt": f"def f{i}(x):\n", "max_tokens": 16, "temperature": 1, "seed": i}
        if not stream:
            return str(server.client.completions.create(**options).choices[0].text)
        chunks = server.client.completions.create(stream=True, **options)
        return "".join(c.choices[0].text for c in chunks)

    alone = [one(i, False) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda i: one(i, True), range(12)))
    assert together == alone


def test_leaving_frees_the_pages(server: ServerProcess) -> None:
    before = server.metric("request_success_total", finished_reason="abort")
    generated = server.metric("generation_tokens_total")
    stream = server.client.completions.create(
        model="default", prompt=PROMPT, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(3):
        next(iter(stream))
    stream.close()
    eventually(lambda: server.metric("request_success_total", finished_reason="abort") == before + 1)
    assert server.get("/load").json() == {"server_load": 0}
    eventually(lambda: server.metric("num_requests_running") == 0 and server.metric("kv_cache_usage_perc") == 0)
    assert server.metric("generation_tokens_total") - generated < 1000  # of the 2000 that were asked for


def test_counters_count_exactly(server: ServerProcess) -> None:
    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_params_n_count",
        "e2e_request_latency_seconds_count",
    )
    before = [server.metric(name) for name in names]
    answer = server.client.completions.create(
        model="default", prompt=[PROMPT, PROMPT], max_tokens=5, n=2, extra_body={"ignore_eos": True}
    )
    after = [server.metric(name) for name in names]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    assert [b - a for a, b in zip(before, after, strict=True)] == [answer.usage.prompt_tokens, 20, 2, 2]


def test_content_parts_and_warnings(server: ServerProcess) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    whole: Any = [{"role": "user", "content": "a\nb"}]
    answers = [
        server.client.chat.completions.create(
            model="default", messages=m, max_tokens=4, max_completion_tokens=3, temperature=0, user="me", store=False
        )
        for m in (parts, whole)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage.completion_tokens <= 3  # type: ignore[union-attr]
    warnings: list[str] = answers[0].warnings  # type: ignore[attr-defined]
    assert sorted(warnings) == ["store: accepted and ignored", "user: accepted and ignored"]


def test_every_histogram_is_filled(server: ServerProcess) -> None:
    names = [
        "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_inference_time_seconds", "request_time_per_output_token_seconds", "request_prompt_tokens",
        "request_generation_tokens", "iteration_tokens_total", "request_params_n", "request_params_max_tokens",
    ]  # fmt: skip
    before = {name: server.metric(f"{name}_count") for name in names}
    server.client.completions.create(model="default", prompt=PROMPT, max_tokens=4, extra_body={"ignore_eos": True})
    gained = {name: server.metric(f"{name}_count") - before[name] for name in names}
    per_token = {"inter_token_latency_seconds": 3, "iteration_tokens_total": 4}
    if gained["iteration_tokens_total"] < 4:  # several turns of a step come together
        assert "jax" in server.arguments
        assert gained["iteration_tokens_total"] == gained["inter_token_latency_seconds"] + 1 >= 2
        per_token = {name: int(gained[name]) for name in per_token}
    assert gained == {name: per_token.get(name, 1) for name in names}
