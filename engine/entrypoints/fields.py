"""Which fields each JSON route takes, with their bounds: data, read by `read_fields` and by the OpenAPI page.

Sampling fields take their bounds from engine.params.BOUNDS, the table of every front door (R2). A null is the same as
leaving a field out. A field that is known and not supported is refused by name with what to do; OpenAI fields that
change nothing about the answer are accepted and reported in `warnings`; a field nobody knows is an error with the
nearest name.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from engine.errors import InvalidValue, Unsupported
from engine.params import BOUNDS, TOKEN_ID, Bound, check_value

SAMPLING = {name: bound for name, bound in BOUNDS.items() if name not in ("detokenize", "skip_reading_prefix_cache")}
BOOL = Bound(bool)
NAME = Bound(str, max_items=256)
TEXT = Bound(str, max_items=32 << 20)
OBJECT = Bound(dict, max_items=64)
MESSAGES = Bound(list, max_items=4096)
TOKEN_IDS = Bound(list, max_items=1 << 22, items=TOKEN_ID)
MAX_PROMPTS = 128

SERVING: dict[str, Bound] = {
    "model": NAME,
    "stream": BOOL,
    "stream_options": OBJECT,
    "echo": BOOL,
    "add_special_tokens": BOOL,
    "return_token_ids": BOOL,
    "return_tokens_as_token_ids": BOOL,
    "priority": Bound(int, -(2**31), 2**31 - 1),
    "cache_salt": Bound(str, max_items=128),
    "request_id": Bound(str, max_items=128),
}
TEMPLATE: dict[str, Bound] = {
    "add_generation_prompt": BOOL,
    "continue_final_message": BOOL,
    "chat_template_kwargs": OBJECT,
}
CHAT: dict[str, Bound] = {
    **SAMPLING,
    **SERVING,
    **TEMPLATE,
    "messages": MESSAGES,
    "logprobs": BOOL,
    "top_logprobs": BOUNDS["logprobs"],
    "max_completion_tokens": BOUNDS["max_tokens"],
}
COMPLETION: dict[str, Bound] = {
    **SAMPLING,
    **SERVING,
    "max_tokens": Bound(int, 0, 2**31 - 1),  # 0 is for echo alone
}
TOKENIZE: dict[str, Bound] = {
    **TEMPLATE,
    "model": NAME,
    "prompt": TEXT,
    "messages": MESSAGES,
    "add_special_tokens": BOOL,
    "return_token_strs": BOOL,
}
DETOKENIZE: dict[str, Bound] = {"model": NAME, "tokens": TOKEN_IDS}
STREAM_OPTIONS: dict[str, Bound] = {"include_usage": BOOL, "continuous_usage_stats": BOOL}

# OpenAI fields that do not change the answer of a server like this one.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "verbosity",
        "parallel_tool_calls",
        "reasoning_effort",
        "include_reasoning",
        "include_obfuscation",
    }
)
# Known to OpenAI or vLLM, not supported here (yet), and never ignored: field -> what to do.
REFUSED: dict[str, str] = {
    "tools": "leave it out, or set tool_choice to 'none'",
    "tool_choice": "only 'none' is supported",
    "functions": "function calling is not supported yet; leave it out",
    "function_call": "function calling is not supported yet; leave it out",
    "response_format": "only {'type': 'text'} is supported; ask for the format in the prompt",
    "structured_outputs": "structured output is not supported yet; ask for the format in the prompt",
    "modalities": "only ['text'] is supported",
    "audio": "audio output is not supported; leave it out",
    "web_search_options": "web search is not supported; leave it out",
    "best_of": "use n",
    "suffix": "insertion is not supported; put the suffix into the prompt",
    "prompt_embeds": "send text or token ids in prompt",
    "use_beam_search": "beam search is not supported; leave it out",
    "length_penalty": "beam search is not supported; leave it out",
    "chat_template": "templates are set when the server starts (--chat-template)",
    "documents": "put the documents into a message",
    "truncation_side": "prompts are truncated on the left; leave it out",
    "mm_processor_kwargs": "media are not supported yet; leave it out",
    "media_io_kwargs": "media are not supported yet; leave it out",
    "kv_transfer_params": "KV transfer is not supported yet; leave it out",
    "ec_transfer_params": "encoder transfer is not supported yet; leave it out",
    "vllm_xargs": "leave it out",
    "thinking_token_budget": "leave it out; max_tokens bounds the whole answer",
    "repetition_detection": "leave it out; use repetition_penalty",
    "logprob_token_ids": "use logprobs",
    "watermarking": "leave it out",
    "stream_interval": "every step is streamed; leave it out",
    "session_id": "leave it out; prefixes are cached by content",
}
# What these accept when given at all; `tools` with tool_choice "none" is ignored with a warning.
HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "truncation_side": ("left",),
    "suffix": ("",),
}


def read_fields(body: Mapping[str, Any], table: Mapping[str, Bound]) -> tuple[dict[str, Any], list[str]]:
    """(the given fields, checked, without nulls; warnings). Raises InvalidValue or Unsupported by name."""
    given: dict[str, Any] = {}
    warnings: list[str] = []
    for name, value in body.items():
        if value is None:
            if name not in table and name not in IGNORED and name not in REFUSED:
                raise unknown(name, table)
            continue
        bound = table.get(name)
        if bound is not None:
            if name == "stop" and isinstance(value, str):
                value = [value]
            check_value(name, value, bound)
            given[name] = value
        elif name in IGNORED:
            warnings.append(f"{name}: accepted and ignored")
        elif name in REFUSED:
            warnings += refuse(name, value, body)
        else:
            raise unknown(name, table)
    return given, warnings


def refuse(name: str, value: Any, body: Mapping[str, Any]) -> list[str]:
    """Raise Unsupported unless the value asks for nothing; then the warnings to give."""
    if value is False or value in ([], {}) or value in HARMLESS_VALUES.get(name, ()):
        return []
    if name == "tools" and body.get("tool_choice") == "none":
        return ["tools: ignored, as tool_choice is 'none'"]
    raise Unsupported(f"{name}: not supported; {REFUSED[name]}", param=name)


def unknown(name: str, table: Mapping[str, Bound]) -> InvalidValue:
    shown = name[:64]
    near = get_close_matches(shown, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InvalidValue(f"{shown!r} is not a field of this request{hint}", param=shown)


def json_schema(table: Mapping[str, Bound], required: tuple[str, ...], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The table as a JSON schema for the OpenAPI page. `extra` gives fields with hand-written schemas."""
    properties = {name: bound_schema(bound) for name, bound in table.items()} | dict(extra)
    if "stop" in properties:
        properties["stop"] = {"anyOf": [{"type": "string"}, properties["stop"]]}
    return {"type": "object", "properties": properties, "required": list(required)}


def bound_schema(bound: Bound) -> dict[str, Any]:
    """One Bound as a JSON schema; every field may be null, which means: left out."""
    names: dict[type, str] = {
        int: "integer",
        float: "number",
        bool: "boolean",
        str: "string",
        list: "array",
        dict: "object",
    }
    schema: dict[str, Any] = {"type": [names[bound.type], "null"]}
    if bound.minimum is not None:
        schema["exclusiveMinimum" if bound.open_min else "minimum"] = bound.minimum
    if bound.maximum is not None:
        schema["maximum"] = bound.maximum
    if bound.max_items is not None:
        limits: dict[type, str] = {str: "maxLength", list: "maxItems", dict: "maxProperties"}
        schema[limits[bound.type]] = bound.max_items
    if bound.items is not None:
        items = bound_schema(bound.items)
        items["type"] = items["type"][0]
        schema["additionalProperties" if bound.type is dict else "items"] = items
    return schema
