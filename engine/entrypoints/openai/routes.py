"""The OpenAI routes and vLLM's two token routes: read, check, tokenize, generate, answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.entrypoints.disconnect import EventStream, unless_left
from engine.entrypoints.engine_client import Output
from engine.entrypoints.fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE, json_schema, read_fields
from engine.entrypoints.http_errors import describe
from engine.entrypoints.openai.answers import Answer, chat_answer, completion_answer
from engine.entrypoints.openai.chunks import DONE, ChatChunks, CompletionChunks
from engine.entrypoints.openai.generation import generate
from engine.entrypoints.openai.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Prompt,
    parse_chat,
    parse_completion,
    read_messages,
    read_template,
)
from engine.entrypoints.serving import Serving, json_response
from engine.errors import InvalidValue

# Text shorter than this is tokenized in the event loop: about a millisecond, less than a trip to a thread and back
# under load. Longer text would hold up every stream.
INLINE_CHARACTERS = 4096

PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}},
    ]
}
CHAT_SCHEMA = json_schema(CHAT, ("messages",), {})
COMPLETION_SCHEMA = json_schema(COMPLETION, ("prompt",), {"prompt": PROMPT_SCHEMA})
TOKENIZE_SCHEMA = json_schema(TOKENIZE, (), {})
DETOKENIZE_SCHEMA = json_schema(DETOKENIZE, ("tokens",), {})


def takes(schema: dict[str, Any]) -> dict[str, Any]:
    """The openapi_extra of a route with this JSON body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def openai_router(serving: Serving) -> APIRouter:
    """The routes bound to one server."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model_card(serving, n) for n in serving.model_names]})

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        return json_response(model_card(serving, serving.check_model(model_id)))

    @router.post("/v1/chat/completions", openapi_extra=takes(CHAT_SCHEMA))
    async def chat(request: Request) -> Response:
        body = await serving.read_json(request)
        return await answer_chat(serving, parse_chat(body, serving.engine.default_sampling), request)

    @router.post("/v1/completions", openapi_extra=takes(COMPLETION_SCHEMA))
    async def completion(request: Request) -> Response:
        body = await serving.read_json(request)
        return await answer_completion(serving, parse_completion(body, serving.engine.default_sampling), request)

    @router.post("/tokenize", openapi_extra=takes(TOKENIZE_SCHEMA))
    async def tokenize(request: Request) -> Response:
        return json_response(await answer_tokenize(serving, await serving.read_json(request)))

    @router.post("/detokenize", openapi_extra=takes(DETOKENIZE_SCHEMA))
    async def detokenize(request: Request) -> Response:
        given, _ = read_fields(await serving.read_json(request), DETOKENIZE)
        serving.check_model(given.get("model"))
        if "tokens" not in given:
            raise InvalidValue("tokens: required; expected a list of token ids", param="tokens")
        return json_response({"prompt": await in_thread(serving.engine.texts.decode, given["tokens"])})

    return router


def model_card(serving: Serving, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(serving.started),
        "owned_by": "twinfer",
        "root": serving.model_root,
        "parent": None,
        "max_model_len": serving.engine.max_model_len,
    }


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(function, *args)


def answer_id(request: GenerationRequest, prefix: str) -> str:
    return f"{prefix}-{request.request_id or uuid.uuid4().hex}"


async def answer_chat(serving: Serving, request: ChatRequest, http: Request) -> Response:
    model = serving.check_model(request.model)
    serving.check_open()
    texts, template = serving.engine.texts, request.template
    prompt = await in_thread(texts.encode_chat, request.messages, template, request.add_special_tokens)
    last = request.messages[-1]
    role = serving.settings.response_role if template.add_generation_prompt else last["role"]
    echo = last["content"] if request.echo and last["role"] == role else ""
    answer = Answer(id=answer_id(request, "chatcmpl"), model=model, role=role, echo=echo)
    if request.stream:
        return stream(serving, request, [prompt], ChatChunks(request, answer), http)

    async def work() -> Response:
        try:
            outputs = await finals(serving, request, [prompt])
        except InvalidValue as error:
            raise chat_name(error) from None
        return json_response(chat_answer(request, answer, outputs[0]))

    return await unless_left(http.receive, counted(serving, work()))


def chat_name(error: Exception) -> Exception:
    """The engine knows `logprobs`; in a chat request that number is called top_logprobs."""
    if isinstance(error, InvalidValue) and error.param == "logprobs":
        return InvalidValue(f"top_{error}", param="top_logprobs")
    return error


async def answer_completion(serving: Serving, request: CompletionRequest, http: Request) -> Response:
    model = serving.check_model(request.model)
    serving.check_open()
    decode = serving.engine.texts.decode
    prompts = await encode_prompts(serving, request.prompts, request.add_special_tokens)
    answer = Answer(id=answer_id(request, "cmpl"), model=model)
    if request.stream:
        return stream(serving, request, prompts, CompletionChunks(request, answer, decode), http)

    async def work() -> Response:
        outputs = await finals(serving, request, prompts)
        return json_response(completion_answer(request, answer, outputs, decode))

    return await unless_left(http.receive, counted(serving, work()))


async def encode_prompts(serving: Serving, prompts: list[Prompt], special: bool) -> list[list[int]]:
    """Token ids of every prompt; ids that came as ids are taken as they are."""
    encode = serving.engine.texts.encode

    def encode_all() -> list[list[int]]:
        return [encode(prompt, special) if isinstance(prompt, str) else prompt for prompt in prompts]

    if sum(len(p) for p in prompts if isinstance(p, str)) <= INLINE_CHARACTERS:
        return encode_all()
    return await asyncio.to_thread(encode_all)


async def counted(serving: Serving, work: Coroutine[Any, Any, Response]) -> Response:
    """`work`, counted as active while it runs."""
    try:
        with serving.generating():
            return await work
    finally:
        work.close()  # not begun when there were too many


async def finals(serving: Serving, request: GenerationRequest, prompts: list[list[int]]) -> list[Output]:
    """The last output of every prompt, in order."""
    found: dict[int, Output] = {}
    async for prompt_idx, output in generate(serving.engine, request, prompts):
        found[prompt_idx] = output
    return [found[i] for i in range(len(prompts))]


def stream(
    serving: Serving,
    request: GenerationRequest,
    prompts: list[list[int]],
    chunks: ChatChunks | CompletionChunks,
    http: Request,
) -> Response:
    """The SSE response. An error after the first event becomes an error event, then the stream ends."""
    request_id: str = http.state.request_id

    async def events() -> AsyncGenerator[bytes, None]:
        sent = False
        with serving.generating():
            outputs = generate(serving.engine, request, prompts)
            try:
                async for prompt_idx, output in outputs:
                    event = chunks.events(prompt_idx, output)
                    if event:
                        sent = True
                        yield event
                yield chunks.end()
            except Exception as error:
                if not sent:
                    raise chat_name(error) if isinstance(request, ChatRequest) else error from None
                yield b"data: " + describe(error, request_id).body() + b"\n\n" + DONE
            finally:
                await outputs.aclose()

    return EventStream(events(), lambda error: serving.error_response(error, request_id), {})


async def answer_tokenize(serving: Serving, body: dict[str, Any]) -> dict[str, Any]:
    given, warnings = read_fields(body, TOKENIZE)
    serving.check_model(given.get("model"))
    texts = serving.engine.texts
    if "prompt" in given and "messages" in given:
        raise InvalidValue("messages: give either prompt or messages", param="messages")
    if "prompt" in given:
        ids = await in_thread(texts.encode, given["prompt"], given.get("add_special_tokens", True))
    else:
        messages = read_messages(given)
        special = given.get("add_special_tokens", False)
        ids = await in_thread(texts.encode_chat, messages, read_template(given), special)
    answer = {"count": len(ids), "max_model_len": serving.engine.max_model_len, "tokens": ids, "token_strs": None}
    if given.get("return_token_strs"):
        answer["token_strs"] = texts.token_strings(ids)
    return answer | ({"warnings": warnings} if warnings else {})
