"""A small engine with the shape of AsyncEngine: it continues any prompt with the alphabet, one token a step.

Tokens are bytes. The k-th output of sequence i is chr(ord('a') + (last prompt byte + i + k) % 26); log p is -0.5 for
the chosen token and -1.5 for the next letter. It knows aborts and death, so that the HTTP layer can be tested alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.entrypoints.engine_client import ChatMessages
from engine.errors import EngineDead, InvalidValue, NeverFits
from engine.params import RequestOutputKind, SamplingParams


@dataclass
class Lp:
    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass
class Sequence1:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Lp]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class Output:
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Lp] | None] | None
    outputs: list[Sequence1]
    finished: bool
    num_cached_tokens: int | None = 0


class ByteTexts:
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def encode_chat(
        self, messages: list[dict[str, Any]], template: ChatMessages, add_special_tokens: bool
    ) -> list[int]:
        text = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        return list((text + ("assistant:" if template.add_generation_prompt else "")).encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        check_bytes(token_ids)
        return bytes(token_ids).decode("utf-8", "replace")

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        return [chr(i) for i in token_ids]


def check_bytes(ids: Sequence[int]) -> None:
    if any(not 0 <= i < 256 for i in ids):
        raise InvalidValue("tokens: expected ids < 256", param="tokens")


def position(token: int) -> dict[int, Lp]:
    return {token: Lp(-0.5, 1, chr(token)), token + 1: Lp(-1.5, 2, chr(token + 1))}


@dataclass
class AlphabetEngine:
    step_s: float = 0.0
    max_model_len: int = 4096
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    is_alive: bool = True
    dies_after: int | None = None  # steps of a request until the engine dies
    texts: ByteTexts = field(default_factory=ByteTexts)
    running: set[str] = field(default_factory=set)
    aborted: list[str] = field(default_factory=list)
    steps: int = 0
    frozen: bool = False  # does not answer pings

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, priority: int, cache_salt: str | None
    ) -> AsyncIterator[Output]:
        count = min(params.max_tokens or 8, self.max_model_len)
        check_bytes(prompt_ids)
        if not prompt_ids:
            raise InvalidValue("prompt: it has no tokens", param="prompt")
        if len(prompt_ids) + 1 > self.max_model_len:
            raise NeverFits(f"prompt: {len(prompt_ids)} tokens do not fit {self.max_model_len}", param="prompt")
        self.running.add(request_id)
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(position(t) for t in prompt_ids[1:])]
        whole = [Sequence1(i, "", [], [] if params.logprobs is not None else None) for i in range(params.n)]
        for k in range(count):
            await asyncio.sleep(self.step_s)
            self.steps += 1
            if self.dies_after is not None and k >= self.dies_after:
                self.is_alive = False
            if not self.is_alive:
                raise EngineDead("gone")
            if request_id not in self.running:
                return
            for s in whole:
                self._grow(s, ord("a") + (prompt_ids[-1] + s.index + k) % 26, k == count - 1)
            if params.output_kind is RequestOutputKind.DELTA:
                delta = [
                    Sequence1(s.index, s.text[-1:], s.token_ids[-1:], s.logprobs and s.logprobs[-1:], s.finish_reason)
                    for s in whole
                ]
                yield Output(prompt_ids, prompt_logprobs, delta, k == count - 1)
        self.running.discard(request_id)
        if params.output_kind is RequestOutputKind.FINAL_ONLY:
            yield Output(prompt_ids, prompt_logprobs, whole, True)

    def _grow(self, s: Sequence1, token: int, last: bool) -> None:
        s.text += chr(token)
        s.token_ids.append(token)
        if s.logprobs is not None:
            s.logprobs.append(position(token))
        s.finish_reason = "length" if last else None

    async def ping(self) -> bool:
        while self.frozen:
            await asyncio.sleep(0.01)
        if not self.is_alive:
            raise EngineDead("gone")
        return True

    async def abort(self, request_id: str) -> None:
        if request_id in self.running:
            self.running.discard(request_id)
            self.aborted.append(request_id)
