"""Bodies of /v1/chat/completions and /v1/completions as typed requests: parse, check, fill in defaults.

Called by the routes with the parsed JSON object. Whatever leaves here is inside the bounds table; what can only be
judged with the tokens in hand (lengths, vocabulary) is the front end's check at admission.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.entrypoints.fields import (
    CHAT,
    COMPLETION,
    MAX_PROMPTS,
    SAMPLING,
    STREAM_OPTIONS,
    TEXT,
    TOKEN_IDS,
    read_fields,
)
from engine.errors import InvalidValue, Unsupported
from engine.frontend.chat import normalise
from engine.params import RequestOutputKind, SamplingParams, check_value

Prompt = str | list[int]
MESSAGE_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning"})


@dataclass(slots=True, kw_only=True)
class GenerationRequest:
    """What both routes share. `model` None means: the served one."""

    params: SamplingParams
    model: str | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: bool
    return_token_ids: bool
    wants_prompt_logprobs: bool  # asked for by name, not only needed by echo
    tokens_as_ids: bool  # logprobs show tokens as "token_id:7"
    priority: int
    cache_salt: str | None
    request_id: str | None
    add_special_tokens: bool
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class TemplateOptions:
    """How messages become a prompt."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    messages: list[dict[str, Any]]
    template: TemplateOptions


@dataclass(slots=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """`prompts` in the order of the body. only_echo: max_tokens 0, answer with the prompt alone."""

    prompts: list[Prompt]
    only_echo: bool = False


def parse_chat(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> ChatRequest:
    """defaults: sampling defaults of the checkpoint's generation_config. Raises RequestError naming the field."""
    given, warnings = read_fields(body, CHAT)
    messages = read_messages(given)
    if "max_completion_tokens" in given:  # the newer name wins, as in OpenAI's API
        given["max_tokens"] = given.pop("max_completion_tokens")
    top = given.pop("top_logprobs", None)
    if given.pop("logprobs", False):
        given["logprobs"] = top or 0
    elif top:
        raise InvalidValue("top_logprobs: needs logprobs to be true", param="top_logprobs")
    template = read_template(given)
    shared = read_shared(given, defaults, warnings, max_tokens=None, add_special_tokens=False)
    return ChatRequest(messages=messages, template=template, **shared)


def parse_completion(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> CompletionRequest:
    """As parse_chat. Raises RequestError naming the field."""
    prompts = read_prompts(body.get("prompt"))
    given, warnings = read_fields({k: v for k, v in body.items() if k != "prompt"}, COMPLETION)
    only_echo = given.get("max_tokens") == 0
    if only_echo:
        if not given.get("echo"):
            raise InvalidValue(
                "max_tokens: 0 is not accepted without echo; expected an integer >= 1", param="max_tokens"
            )
        given["max_tokens"] = 1  # the model still has to score the prompt; its one token is dropped
        given.pop("min_tokens", None)
    shared = read_shared(given, defaults, warnings, max_tokens=16, add_special_tokens=True)
    params: SamplingParams = shared["params"]
    if shared["echo"] and params.logprobs is not None and params.prompt_logprobs is None:
        params.prompt_logprobs = params.logprobs
    return CompletionRequest(prompts=prompts, only_echo=only_echo, **shared)


def read_shared(
    given: dict[str, Any],
    defaults: Mapping[str, Any],
    warnings: list[str],
    *,
    max_tokens: int | None,
    add_special_tokens: bool,
) -> dict[str, Any]:
    """The arguments of GenerationRequest. max_tokens: what it is when neither request nor checkpoint says."""
    stream = given.get("stream", False)
    options: dict[str, Any] = {}
    if "stream_options" in given:
        if not stream:
            raise InvalidValue("stream_options: only accepted with stream true", param="stream_options")
        options, more = read_fields(given["stream_options"], STREAM_OPTIONS)
        warnings += [f"stream_options.{line}" for line in more]
    sampling: dict[str, Any] = {"max_tokens": max_tokens, **defaults}
    sampling |= {name: given[name] for name in SAMPLING if name in given}
    params = SamplingParams(**sampling, output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY)
    if stream and params.prompt_logprobs is not None and not given.get("echo"):
        raise Unsupported("prompt_logprobs: not supported in a stream; set stream to false", param="prompt_logprobs")
    return {
        "params": params,
        "model": given.get("model"),
        "stream": stream,
        "include_usage": options.get("include_usage", False),
        "continuous_usage": options.get("continuous_usage_stats", False),
        "echo": given.get("echo", False),
        "return_token_ids": given.get("return_token_ids", False),
        "wants_prompt_logprobs": params.prompt_logprobs is not None,
        "tokens_as_ids": given.get("return_tokens_as_token_ids", False),
        "priority": given.get("priority", 0),
        "cache_salt": given.get("cache_salt"),
        "request_id": given.get("request_id"),
        "add_special_tokens": given.get("add_special_tokens", add_special_tokens),
        "warnings": warnings,
    }


def read_template(given: dict[str, Any]) -> TemplateOptions:
    """Raises InvalidValue when the two switches contradict each other."""
    continued = given.get("continue_final_message", False)
    if continued and given.get("add_generation_prompt"):
        raise InvalidValue(
            "continue_final_message: cannot be true together with add_generation_prompt", param="continue_final_message"
        )
    return TemplateOptions(
        add_generation_prompt=given.get("add_generation_prompt", not continued),
        continue_final_message=continued,
        kwargs=given.get("chat_template_kwargs", {}),
    )


def read_messages(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages as templates expect them, content as one string. Raises RequestError by path."""
    if not given.get("messages"):
        raise InvalidValue("messages: required; expected a non-empty list of messages", param="messages")
    for i, message in enumerate(given["messages"]):
        path = f"messages[{i}]"
        if not isinstance(message, dict):
            raise InvalidValue(f"{path}: expected an object with role and content", param=path)
        for name, value in message.items():
            if name not in MESSAGE_FIELDS and value is not None:
                raise InvalidValue(f"{path}: {name[:64]!r} is not a field of a message", param=path)
        if not isinstance(message.get("role"), str) or not 0 < len(message["role"]) <= 64:
            raise InvalidValue(f"{path}.role: expected a string such as 'user'", param=f"{path}.role")
    return normalise(given["messages"])


def read_prompts(value: Any) -> list[Prompt]:
    """A string, a list of strings, token ids, or a list of token-id lists, as a list of prompts."""
    if value is None:
        raise InvalidValue("prompt: required; expected a string, token ids, or a list of either", param="prompt")
    if isinstance(value, str):
        check_value("prompt", value, TEXT)
        return [value]
    if not isinstance(value, list) or not value:
        raise InvalidValue("prompt: expected a string, token ids, or a non-empty list of either", param="prompt")
    if isinstance(value[0], int) and not isinstance(value[0], bool):
        check_value("prompt", value, TOKEN_IDS)
        return [value]
    if len(value) > MAX_PROMPTS:
        raise InvalidValue(f"prompt: {len(value)} prompts; at most {MAX_PROMPTS} in one request", param="prompt")
    for i, prompt in enumerate(value):
        check_value(f"prompt[{i}]", prompt, TEXT if isinstance(prompt, str) else TOKEN_IDS)
        if isinstance(prompt, list) and not prompt:
            raise InvalidValue(f"prompt[{i}]: [] is not accepted; expected at least one token id", param="prompt")
    return value
