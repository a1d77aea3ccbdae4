"""Pieces: what bytes each token id stands for, so that text can be built token by token at constant cost.

Read once from a tokenizer's decoder. For byte-level BPE the bytes of a sequence are exactly those of its tokens one
after another; for SentencePiece-like decoders (Replace, ByteFallback, Fuse, Strip, or Metaspace) also, but for a
leading space at the very start. Other decoders have no pieces: `read_pieces` gives None and detokenizer.py decodes
windows instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

ToBytes = Callable[[str], bytes]
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class LeadingSpace(Enum):
    """What a decoder does to spaces at the start of a text."""

    KEEP = 0
    DROP_ONE = 1  # Strip(" ", start=1): one space before everything
    DROP_IN_FIRST_TOKEN = 2  # Metaspace: every space mark of the first token


class Pieces:
    """Token id -> bytes, worked out on first use and kept."""

    def __init__(
        self,
        backend: FastTokenizer,
        added: Mapping[int, str],
        to_bytes: ToBytes,
        added_to_bytes: ToBytes,
        leading: LeadingSpace,
    ) -> None:
        self._backend = backend
        self._added = added
        self._to_bytes = to_bytes
        self._added_to_bytes = added_to_bytes
        self.leading = leading
        self._bytes: dict[int, bytes] = {}
        self.whole: dict[int, str | None] = {}
        """Text of a token that is UTF-8 by itself, None for parts of characters; filled together with `bytes`."""

    def bytes(self, token_id: int) -> bytes:
        """The bytes of one token; b"" for an id that the tokenizer does not know."""
        piece = self._bytes.get(token_id)
        if piece is None:
            content = self._added.get(token_id)
            if content is not None:
                piece = self._added_to_bytes(content)
            else:
                token = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
                piece = b"" if token is None else self._to_bytes(token)
            try:
                self.whole[token_id] = piece.decode()
            except UnicodeDecodeError:
                self.whole[token_id] = None
            self._bytes[token_id] = piece
        return piece

    def text(self, token_id: int) -> str:
        """One token by itself, U+FFFD for what is not UTF-8."""
        return self.bytes(token_id).decode(errors="replace")


def byte_of_char() -> dict[str, int]:
    """GPT-2's printable character for each byte, the other way round."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in plain}
    others = [b for b in range(256) if b not in set(plain)]
    table.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return table


BYTE_OF_CHAR = byte_of_char()


def byte_level(token: str) -> bytes:
    """As the tokenizers library: a token with a character outside the table stands for its own UTF-8."""
    try:
        return bytes([BYTE_OF_CHAR[c] for c in token])
    except KeyError:
        return token.encode()


def read_pieces(backend: FastTokenizer, added: Mapping[int, str]) -> Pieces | None:
    """Pieces for the decoders we can read exactly, else None."""
    if backend.decoder is None:
        return None
    steps = flatten(json.loads(backend.decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Pieces(backend, added, byte_level, byte_level, LeadingSpace.KEEP)
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        leading = LeadingSpace.KEEP if steps[0].get("prepend_scheme") == "never" else LeadingSpace.DROP_IN_FIRST_TOKEN

        def metaspace(token: str) -> bytes:
            return token.replace(mark, " ").encode()

        return Pieces(backend, added, metaspace, metaspace, leading)
    return read_sentencepiece(backend, added, steps)


def flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for child in decoder["decoders"] for step in flatten(child)]


def read_sentencepiece(backend: FastTokenizer, added: Mapping[int, str], steps: list[dict[str, Any]]) -> Pieces | None:
    """Replace(string)* ByteFallback? Fuse? Strip(" ", 1, 0)?, in this order."""
    replaces: list[tuple[str, str]] = []
    rest = list(steps)
    while rest and rest[0]["type"] == "Replace" and "String" in rest[0]["pattern"]:
        step = rest.pop(0)
        replaces.append((step["pattern"]["String"], step["content"]))
    has_byte_tokens = bool(rest) and rest[0]["type"] == "ByteFallback"
    rest = rest[1:] if has_byte_tokens else rest
    fused = bool(rest) and rest[0]["type"] == "Fuse"
    rest = rest[1:] if fused else rest
    leading = LeadingSpace.KEEP
    if fused and rest and rest[0] == {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
        leading = LeadingSpace.DROP_ONE
        rest = rest[1:]
    if rest or not steps:
        return None

    def to_bytes(token: str) -> bytes:
        match = BYTE_TOKEN.fullmatch(token) if has_byte_tokens else None
        if match is not None:
            return bytes([int(match[1], 16)])
        for old, new in replaces:
            token = token.replace(old, new)
        return token.encode()

    return Pieces(backend, added, to_bytes, to_bytes, leading)
