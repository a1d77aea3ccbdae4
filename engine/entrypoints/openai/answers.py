"""Whole (not streamed) answers of the two OpenAI routes, and the token counts that streams share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.entrypoints.engine_client import Completion, Output, PositionLogprobs
from engine.entrypoints.openai.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs_json
from engine.entrypoints.openai.requests import ChatRequest, CompletionRequest, GenerationRequest

Decode = Callable[[Sequence[int]], str]


@dataclass(slots=True, kw_only=True)
class Answer:
    """What is fixed before the first token. `echo` is the text before the generated one, per prompt."""

    id: str
    model: str
    role: str = "assistant"
    echo: str = ""  # chat: the last message's content, when asked for
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(slots=True)
class Usage:
    """Token counts of one HTTP request, over all its prompts and sequences."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    _seen: set[int] = field(default_factory=set)

    def add(self, prompt_idx: int, output: Output) -> None:
        """Count the prompt once, and the tokens of this output (new ones in a stream, all in a whole answer)."""
        if prompt_idx not in self._seen:
            self._seen.add(prompt_idx)
            self.prompt += len(output.prompt_token_ids or ())
            self.cached += max(0, output.num_cached_tokens or 0)
        self.completion += sum(len(c.token_ids) for c in output.outputs)

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def envelope(answer: Answer, kind: str, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    return {
        "id": answer.id,
        "object": kind,
        "created": answer.created,
        "model": answer.model,
        "choices": choices,
        "usage": usage.json(),
        "system_fingerprint": None,
    }


def extras(request: GenerationRequest, completion: Completion) -> dict[str, Any]:
    """Fields of a choice beyond OpenAI's."""
    found: dict[str, Any] = {"stop_reason": completion.stop_reason}
    if request.return_token_ids:
        found["token_ids"] = list(completion.token_ids)
    return found


def chat_answer(request: ChatRequest, answer: Answer, output: Output) -> dict[str, Any]:
    """The chat.completion object. output: a FINAL_ONLY one."""
    usage = Usage()
    usage.add(0, output)
    choices = []
    for completion in sorted(output.outputs, key=lambda c: c.index):
        logprobs = None
        if request.params.logprobs is not None and completion.logprobs is not None:
            logprobs = chat_logprobs(
                completion.token_ids, completion.logprobs, request.params.logprobs, request.tokens_as_ids
            )
        choices.append(
            {
                "index": completion.index,
                "message": {"role": answer.role, "content": answer.echo + completion.text, "refusal": None},
                "logprobs": logprobs,
                "finish_reason": completion.finish_reason,
                **extras(request, completion),
            }
        )
    body = envelope(answer, "chat.completion", choices, usage)
    if request.return_token_ids:
        body["prompt_token_ids"] = list(output.prompt_token_ids or ())
    if request.wants_prompt_logprobs and output.prompt_logprobs is not None:
        body["prompt_logprobs"] = prompt_logprobs_json(output.prompt_logprobs)
    if request.warnings:
        body["warnings"] = request.warnings
    return body


def completion_answer(
    request: CompletionRequest, answer: Answer, outputs: Sequence[Output], decode: Decode
) -> dict[str, Any]:
    """The text_completion object. outputs: one FINAL_ONLY output a prompt, in order."""
    usage = Usage()
    choices = []
    for prompt_idx, output in enumerate(outputs):
        usage.add(prompt_idx, output)
        for completion in sorted(output.outputs, key=lambda c: c.index):
            choice = completion_choice(request, output, completion, decode)
            choices.append({"index": prompt_idx * request.params.n + completion.index, **choice})
    if request.only_echo:
        usage.completion = 0
    body = envelope(answer, "text_completion", choices, usage)
    if request.warnings:
        body["warnings"] = request.warnings
    return body


def completion_choice(
    request: CompletionRequest, output: Output, completion: Completion, decode: Decode
) -> dict[str, Any]:
    """One choice without its index. only_echo: the prompt alone, as if nothing had been generated."""
    echo = echo_text(request, output, decode)
    logprobs = None
    if request.params.logprobs is not None:
        logprobs = CompletionLogprobs(request.params.logprobs, request.tokens_as_ids)
        add_echo_logprobs(logprobs, request, output, output.prompt_logprobs, decode)
        if not request.only_echo:
            logprobs.add(completion.token_ids, completion.logprobs or ())
    choice: dict[str, Any] = {
        "text": echo if request.only_echo else echo + completion.text,
        "logprobs": None if logprobs is None else logprobs.take(),
        "finish_reason": "length" if request.only_echo else completion.finish_reason,
        **({"stop_reason": None} if request.only_echo else extras(request, completion)),
    }
    if request.return_token_ids:
        choice["prompt_token_ids"] = list(output.prompt_token_ids or ())
    if request.wants_prompt_logprobs and output.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs_json(output.prompt_logprobs)
    return choice


def echo_text(request: CompletionRequest, output: Output, decode: Decode) -> str:
    """The prompt as text when echo is asked for: the tokens that were really used (after truncation)."""
    return decode(output.prompt_token_ids or ()) if request.echo else ""


def add_echo_logprobs(
    logprobs: CompletionLogprobs,
    request: CompletionRequest,
    output: Output,
    positions: Sequence[PositionLogprobs | None] | None,
    decode: Decode,
) -> None:
    """The prompt's tokens first. positions: the prompt logprobs, None when there are none."""
    if request.echo and positions is not None:
        ids = output.prompt_token_ids or ()
        logprobs.add(ids, positions, first=decode(ids[:1]))
