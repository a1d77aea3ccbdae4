"""Tokenizer: text to ids and ids to bytes, over a Hugging Face fast tokenizer. No code of a checkpoint ever runs.

Loaded once by a front end; the engine core's process never imports this. Thread-safe after construction: encoding
only reads (the Rust side releases the interpreter lock), tables only grow.

Guarded encoding: text that a user wrote inside a chat must not become a control token (R12). `guard` puts a marker
that nobody can guess into every special token spelled in such text; the rendered chat then goes through a copy of the
tokenizer whose normaliser removes the marker after special tokens were recognised. The ids are those of the same text
with the spelled tokens read as plain text.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from engine.errors import ConfigError, InvalidValue
from engine.frontend.pieces import Pieces, read_pieces


class Tokenizer:
    """A fast tokenizer and what the front end needs around it."""

    def __init__(self, hf: Any, source: str) -> None:
        """hf: a transformers tokenizer with a Rust backend, owned by this object from now on. source: its folder."""
        self.hf = hf
        self.source = source
        self.backend: FastTokenizer = hf.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self.special_texts: tuple[str, ...] = tuple(token.content for token in added.values() if token.special)
        self.pieces: Pieces | None = read_pieces(self.backend, {i: token.content for i, token in added.items()})

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        return None if self.hf.eos_token_id is None else int(self.hf.eos_token_id)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return encode_with(self.backend, text, add_special_tokens)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The whole text of `ids`."""
        return str(self.backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """One token by itself, with its leading space; a part of a character shows as U+FFFD."""
        if self.pieces is not None:
            return self.pieces.text(token_id)
        return str(self.backend.decode([token_id], skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""
        return self.token_text(token_id).encode() if self.pieces is None else self.pieces.bytes(token_id)

    @cached_property
    def _marker(self) -> str:
        """Private-use characters that are in no token and that no client can guess."""
        return "".join(chr(0xF0000 + secrets.randbelow(0xFFFD)) for _ in range(6))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        """Matches any spelled special token, longest first; one-character tokens cannot be split."""
        texts = sorted((t for t in self.special_texts if len(t) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    @cached_property
    def _guarded(self) -> FastTokenizer:
        """The tokenizer with a normaliser that drops the marker, special tokens matched before it."""
        state = json.loads(self.backend.to_str())
        drop = {"type": "Replace", "pattern": {"String": self._marker}, "content": ""}
        old = state.get("normalizer")
        state["normalizer"] = drop if old is None else {"type": "Sequence", "normalizers": [drop, old]}
        for token in state.get("added_tokens", ()):
            if token["special"]:
                token["normalized"] = False
        return FastTokenizer.from_str(json.dumps(state))

    def guard(self, text: str) -> str:
        """`text` with every spelled special token marked as plain text; the same object where there is none."""
        if self._special_pattern is None:
            return text
        return self._special_pattern.sub(lambda match: match[0][0] + self._marker + match[0][1:], text)

    def encode_guarded(self, text: str, add_special_tokens: bool) -> tuple[str, list[int]]:
        """(text without markers, ids) of a rendered chat."""
        if self._marker not in text:
            return text, self.encode(text, add_special_tokens)
        return text.replace(self._marker, ""), encode_with(self._guarded, text, add_special_tokens)


def encode_with(backend: FastTokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Raises InvalidValue for a string that is not Unicode text."""
    try:
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
    except (TypeError, UnicodeEncodeError):
        raise InvalidValue("prompt: a lone surrogate (half of a UTF-16 pair) is not text", param="prompt") from None
    return ids


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a fast tokenizer from a folder. Raises ConfigError in one line."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss torch; only its tokenizers are used
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import: only where text is handled

    folder = Path(source)
    has_json = (folder / "tokenizer.json").is_file()
    try:
        hf = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, use_fast=True)
    except (ValueError, KeyError, OSError, ImportError, AttributeError, TypeError) as error:
        # an unknown tokenizer class, or one that only exists as code of the checkpoint: tokenizer.json says it all
        if not has_json:
            raise ConfigError(f"--tokenizer: no usable tokenizer in {str(source)!r}: {first_line(error)}") from None
        hf = PreTrainedTokenizerFast.from_pretrained(str(source))
    if not getattr(hf, "is_fast", False):
        raise ConfigError(f"--tokenizer: {str(source)!r} has no tokenizer.json; only fast tokenizers are supported")
    return Tokenizer(hf, str(source))


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
