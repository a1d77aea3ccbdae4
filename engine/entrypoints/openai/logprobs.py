"""Logprobs in OpenAI's two shapes: the chat list of tokens, and the completions struct of arrays.

JSON has no infinity, so a probability of zero is shown as FLOOR, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.entrypoints.engine_client import PositionLogprobs, TokenLogprob

FLOOR = -9999.0


def shown(token_id: int, entry: TokenLogprob, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids else entry.decoded_token or ""


def most_likely(position: PositionLogprobs, count: int) -> list[tuple[int, TokenLogprob]]:
    """The first `count` entries, most likely first; all of them when it is -1."""
    ranked = sorted(position.items(), key=lambda item: -item[1].logprob)
    return ranked if count < 0 else ranked[:count]


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[PositionLogprobs], top: int, as_ids: bool
) -> dict[str, Any]:
    """choices[].logprobs of a chat answer; one entry a token."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        entry = chat_entry(token_id, position[token_id], as_ids)
        entry["top_logprobs"] = [chat_entry(i, lp, as_ids) for i, lp in most_likely(position, top)]
        content.append(entry)
    return {"content": content, "refusal": None}


def chat_entry(token_id: int, entry: TokenLogprob, as_ids: bool) -> dict[str, Any]:
    text = shown(token_id, entry, as_ids)
    return {"token": text, "logprob": max(entry.logprob, FLOOR), "bytes": list(text.encode("utf-8", "replace"))}


@dataclass(slots=True)
class CompletionLogprobs:
    """choices[].logprobs of a completion, filled token by token; `offset` is the length of the text so far."""

    top: int
    as_ids: bool
    offset: int = 0
    text_offset: list[int] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)

    def add(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None], first: str = "") -> None:
        """Append tokens. positions[0] is None for the first token of a prompt, whose text is `first`."""
        for token_id, position in zip(token_ids, positions, strict=True):
            if position is None:
                text = f"token_id:{token_id}" if self.as_ids else first
                self.token_logprobs.append(None)
                self.top_logprobs.append(None)
            else:
                chosen = position[token_id]
                text = shown(token_id, chosen, self.as_ids)
                self.token_logprobs.append(max(chosen.logprob, FLOOR))
                self.top_logprobs.append(self._top(token_id, position))
            self.text_offset.append(self.offset)
            self.tokens.append(text)
            self.offset += len(text)

    def _top(self, token_id: int, position: PositionLogprobs) -> dict[str, float]:
        """Text -> logprob of the most likely tokens and the chosen one. Tokens of equal text: the most likely."""
        entries = most_likely(position, self.top)
        if all(i != token_id for i, _ in entries):
            entries.append((token_id, position[token_id]))
        best: dict[str, float] = {}
        for i, entry in entries:
            best.setdefault(shown(i, entry, self.as_ids), max(entry.logprob, FLOOR))
        return best

    def take(self) -> dict[str, Any]:
        """What was added since the last take, as JSON; the offset runs on."""
        taken = {
            "text_offset": self.text_offset,
            "token_logprobs": self.token_logprobs,
            "tokens": self.tokens,
            "top_logprobs": self.top_logprobs,
        }
        self.text_offset, self.token_logprobs, self.tokens, self.top_logprobs = [], [], [], []
        return taken


def prompt_logprobs_json(positions: Sequence[PositionLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: per prompt token null or {token id: {logprob, rank, decoded_token}}."""
    return [
        None
        if position is None
        else {
            str(i): {"logprob": max(lp.logprob, FLOOR), "rank": lp.rank, "decoded_token": lp.decoded_token}
            for i, lp in position.items()
        }
        for position in positions
    ]
