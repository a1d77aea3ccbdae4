"""Texts: text to ids and back for routes that only need that (/tokenize, /detokenize, echo). Thread-safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from engine.errors import Unsupported
from engine.frontend.input import InputProcessor
from engine.frontend.tokenizer import Tokenizer


class TemplateOptions(Protocol):
    """How messages become a prompt; the routes' own type fits."""

    @property
    def add_generation_prompt(self) -> bool: ...
    @property
    def continue_final_message(self) -> bool: ...
    @property
    def kwargs(self) -> Mapping[str, Any]: ...


class Texts:
    """The text side of one model."""

    def __init__(self, inputs: InputProcessor) -> None:
        self._inputs = inputs

    def _tokenizer(self) -> Tokenizer:
        if self._inputs.tokenizer is None:
            raise Unsupported("there is no tokenizer (skip_tokenizer_init); give token ids")
        return self._inputs.tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._inputs.encode(text, add_special_tokens)

    def encode_chat(
        self, messages: list[dict[str, Any]], template: TemplateOptions, add_special_tokens: bool = False
    ) -> list[int]:
        """Ids of a chat. Special tokens spelled inside messages stay plain text."""
        _, ids = self._inputs.encode_chat(
            messages,
            add_special_tokens=add_special_tokens,
            add_generation_prompt=template.add_generation_prompt,
            continue_final_message=template.continue_final_message,
            chat_template_kwargs=template.kwargs,
        )
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The whole text, special tokens shown."""
        return self._tokenizer().decode(self._inputs.check_ids(token_ids, "tokens"))

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token by itself; a part of a character shows as U+FFFD."""
        tokenizer = self._tokenizer()
        return [tokenizer.token_text(i) for i in token_ids]

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        tokenizer = self._tokenizer()
        return [tokenizer.token_bytes(i) for i in token_ids]
