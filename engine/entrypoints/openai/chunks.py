"""Server-sent events of the two OpenAI streams, built from byte templates: no model object per token.

Everything that a stream repeats (id, created, model) is encoded once; a token costs one orjson call for its text.
A chunk holds one choice; the chunks of one engine output are joined and sent together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from engine.entrypoints.engine_client import Completion, Output, PositionLogprobs
from engine.entrypoints.openai.answers import Answer, Decode, Usage, add_echo_logprobs, echo_text
from engine.entrypoints.openai.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs_json
from engine.entrypoints.openai.requests import ChatRequest, CompletionRequest, GenerationRequest

DONE = b"data: [DONE]\n\n"


class Chunks:
    """What both streams share: the head, the tail with usage, the closing events."""

    def __init__(self, request: GenerationRequest, answer: Answer, kind: str) -> None:
        self.usage = Usage()
        self._request = request
        self._started: set[int] = set()
        fixed = orjson.dumps({"id": answer.id, "object": kind, "created": answer.created, "model": answer.model})
        self._head = b"data: " + fixed[:-1] + b',"choices":['
        # a stream that will end with usage says null before, as OpenAI's does
        self._tail = b'],"usage":null}\n\n' if request.include_usage else b"]}\n\n"
        self._warnings = b""
        if request.warnings:
            self._warnings = b'],"warnings":' + orjson.dumps(request.warnings)

    def chunk(self, choice: bytes) -> bytes:
        """One event with one choice. The first event of a stream carries the warnings."""
        tail = self._tail
        if self._request.continuous_usage:
            tail = b'],"usage":' + orjson.dumps(self.usage.json()) + b"}\n\n"
        if self._warnings:
            tail, self._warnings = self._warnings + tail[1:], b""
        return self._head + choice + tail

    def choice(self, index: int, payload: bytes, completion: Completion, logprobs: dict[str, Any] | None) -> bytes:
        """payload: the member that carries the text, e.g. b'"text":"a"'."""
        parts = [b'{"index":%d,' % index, payload, b',"logprobs":']
        parts.append(b"null" if logprobs is None else orjson.dumps(logprobs))
        if completion.finish_reason is None:
            parts.append(b',"finish_reason":null')
        else:
            parts += [b',"finish_reason":', orjson.dumps(completion.finish_reason)]
            parts += [b',"stop_reason":', orjson.dumps(completion.stop_reason)]
        if self._request.return_token_ids:
            parts += [b',"token_ids":', orjson.dumps(self.shown_ids(completion))]
        parts.append(b"}")
        return b"".join(parts)

    def shown_ids(self, completion: Completion) -> list[int]:
        return list(completion.token_ids)

    def worth_sending(self, completion: Completion) -> bool:
        """A delta without text (half a character, text held back for a stop string) waits, unless it carries more."""
        return bool(
            completion.text
            or completion.finish_reason is not None
            or (completion.token_ids and (self._request.return_token_ids or completion.logprobs))
        )

    def end(self) -> bytes:
        if not self._request.include_usage:
            return DONE
        return self._head + b'],"usage":' + orjson.dumps(self.usage.json()) + b"}\n\n" + DONE


class ChatChunks(Chunks):
    """chat.completion.chunk events."""

    def __init__(self, request: ChatRequest, answer: Answer) -> None:
        super().__init__(request, answer, "chat.completion.chunk")
        self._chat = request
        self._role = orjson.dumps(answer.role)
        self._echo = answer.echo

    def events(self, prompt_idx: int, output: Output) -> bytes:
        """The events of one DELTA output; b"" when there is nothing to say."""
        self.usage.add(prompt_idx, output)
        return b"".join(self._event(c, output) for c in output.outputs)

    def _event(self, completion: Completion, output: Output) -> bytes:
        opening = b""
        if completion.index not in self._started:
            if not completion.token_ids and completion.finish_reason is None:
                return b""  # the prompt is not done yet
            self._started.add(completion.index)
            opening = self._opening(completion.index, output)
        if not self.worth_sending(completion):
            return opening
        logprobs = None
        params = self._chat.params
        if params.logprobs is not None and completion.logprobs:
            logprobs = chat_logprobs(
                completion.token_ids, completion.logprobs, params.logprobs, self._chat.tokens_as_ids
            )
        payload = b'"delta":{"content":' + orjson.dumps(completion.text) + b"}"
        return opening + self.chunk(self.choice(completion.index, payload, completion, logprobs))

    def _opening(self, index: int, output: Output) -> bytes:
        choice = b'{"index":%d,"delta":{"role":%s,"content":%s},"logprobs":null,"finish_reason":null' % (
            index,
            self._role,
            orjson.dumps(self._echo),
        )
        if self._chat.return_token_ids:
            choice += b',"prompt_token_ids":' + orjson.dumps(list(output.prompt_token_ids or ()))
        return self.chunk(choice + b"}")


class CompletionChunks(Chunks):
    """text_completion events; choice index = prompt index * n + sequence index."""

    def __init__(self, request: CompletionRequest, answer: Answer, decode: Decode) -> None:
        super().__init__(request, answer, "text_completion")
        self._completion = request
        self._decode = decode
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._prompt_logprobs: dict[int, Sequence[PositionLogprobs | None]] = {}  # a DELTA stream gives them once

    def events(self, prompt_idx: int, output: Output) -> bytes:
        """The events of one DELTA output; b"" when there is nothing to say."""
        self.usage.add(prompt_idx, output)
        if self._completion.only_echo:
            self.usage.completion = 0
        if output.prompt_logprobs is not None:
            self._prompt_logprobs.setdefault(prompt_idx, output.prompt_logprobs)
        return b"".join(self._event(prompt_idx, c, output) for c in output.outputs)

    def _event(self, prompt_idx: int, completion: Completion, output: Output) -> bytes:
        request = self._completion
        index = prompt_idx * request.params.n + completion.index
        text, extra = completion.text, b""
        first = index not in self._started
        logprobs = self._logprobs.get(index)
        if first:
            if not completion.token_ids and completion.finish_reason is None:
                return b""  # the prompt is not done yet
            self._started.add(index)
            positions = self._prompt_logprobs.get(prompt_idx)
            echo, extra = echo_text(request, output, self._decode), self._prompt_extras(output, positions)
            text = echo if request.only_echo else echo + text
            if request.params.logprobs is not None:
                logprobs = CompletionLogprobs(request.params.logprobs, request.tokens_as_ids)
                self._logprobs[index] = logprobs
                add_echo_logprobs(logprobs, request, output, positions, self._decode)
        elif not self.worth_sending(completion):
            return b""
        if logprobs is not None and completion.logprobs and not request.only_echo:
            logprobs.add(completion.token_ids, completion.logprobs)
        taken = logprobs.take() if logprobs is not None else None
        payload = b'"text":' + orjson.dumps(text) + extra
        return self.chunk(self.choice(index, payload, completion, taken))

    def shown_ids(self, completion: Completion) -> list[int]:
        return [] if self._completion.only_echo else super().shown_ids(completion)

    def _prompt_extras(self, output: Output, positions: Sequence[PositionLogprobs | None] | None) -> bytes:
        extra = b""
        if self._completion.return_token_ids:
            extra = b',"prompt_token_ids":' + orjson.dumps(list(output.prompt_token_ids or ()))
        if self._completion.wants_prompt_logprobs and positions is not None:
            extra += b',"prompt_logprobs":' + orjson.dumps(prompt_logprobs_json(positions))
        return extra
