"""Text of one sequence, token by token: incremental decoding, then stop strings with hold-back.

Used by output.py, one Detokenizer a sequence. Cost per token is bounded, whatever came before. Always true: the
pieces of text given out, put together, are the whole text, however the tokens were cut into steps and the text into
reads (F-2); nothing given out is ever taken back.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from engine.frontend.pieces import LeadingSpace, Pieces
from engine.frontend.tokenizer import Tokenizer

MAX_HELD_TOKENS = 16  # a character has at most 4 bytes; what has not become text after this many tokens never will
CONTEXT_TOKENS = 6  # tokens before the window that settle spaces


class Decoder(Protocol):
    """Token ids in, text out as soon as it is settled."""

    def step(self, token_id: int) -> str: ...

    def flush(self) -> str:
        """What was held back, incomplete characters as U+FFFD."""


class PieceDecoder:
    """For tokenizers whose text is the concatenation of their tokens' bytes."""

    __slots__ = ("_at_start", "_hidden", "_pending", "_pieces")

    def __init__(self, pieces: Pieces, hidden: frozenset[int], at_start: bool) -> None:
        """hidden: ids that give no text. at_start: no text comes before, so a leading space may go."""
        self._pieces = pieces
        self._hidden = hidden
        self._pending = b""
        self._at_start = at_start and pieces.leading is not LeadingSpace.KEEP

    def step(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        text = self._pieces.whole.get(token_id)
        if text is None or self._pending or self._at_start:
            return self._slow_step(token_id)
        return text

    def _slow_step(self, token_id: int) -> str:
        piece = self._pieces.bytes(token_id)
        if self._at_start and piece:
            self._at_start = False
            if self._pieces.leading is LeadingSpace.DROP_ONE:
                piece = piece.removeprefix(b" ")
            else:
                piece = piece.replace(b" ", b"")
        data = self._pending + piece
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        text = self._pending.decode(errors="replace")
        self._pending = b""
        return text


class WindowDecoder:
    """For any other decoder: text of a short window of ids, less the text of the window's settled front."""

    def __init__(
        self, tokenizer: Tokenizer, hidden: frozenset[int], context: Sequence[int], join_special: bool
    ) -> None:
        """context: the last ids of the prompt. join_special: no space between neighbouring special tokens."""
        self._backend = tokenizer.backend
        self._hidden = hidden
        self._window = [i for i in context[-CONTEXT_TOKENS:] if i not in hidden]
        self._settled = len(self._window)  # ids of the window whose text was given out
        self._specials = tokenizer.special_ids if join_special else frozenset()
        self._last_special = False

    def step(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        if self._is_later_special(token_id):
            return self._settle(str(self._backend.id_to_token(token_id)))
        before, now = self._texts()
        if now.endswith("�") and len(self._window) - self._settled < MAX_HELD_TOKENS:
            return ""
        return self._settle(now[len(before) :])

    def _is_later_special(self, token_id: int) -> bool:
        last, self._last_special = self._last_special, token_id in self._specials
        return last and self._last_special

    def _texts(self) -> tuple[str, str]:
        """(text of the settled front, text of the window)."""
        before = self._backend.decode(self._window[: self._settled], skip_special_tokens=False)
        return before, self._backend.decode(self._window, skip_special_tokens=False)

    def _settle(self, text: str) -> str:
        self._window = self._window[-CONTEXT_TOKENS:]
        self._settled = len(self._window)
        return text

    def flush(self) -> str:
        if self._settled == len(self._window):
            return ""
        before, now = self._texts()
        return self._settle(now[len(before) :])


class StopMatcher:
    """Finds stop strings in text that comes in pieces: one Knuth-Morris-Pratt automaton a string."""

    __slots__ = ("_fallbacks", "_states", "_stops", "held")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._fallbacks = tuple(fallbacks(stop) for stop in stops)
        self._states = [0] * len(self._stops)  # characters of each stop string that the text ends with
        self.held = 0  # last characters that may begin a stop string: the largest state

    def feed(self, text: str, armed: bool) -> tuple[str, int] | None:
        """Read `text`; (stop string, characters of `text` up to its end) of the first match.

        armed: whether a stop string may end in this text; one that ends while unarmed is text like any other.
        """
        states = self._states
        for at, char in enumerate(text):
            for i, stop in enumerate(self._stops):
                state, fallback = states[i], self._fallbacks[i]
                while state and stop[state] != char:
                    state = fallback[state - 1]
                if stop[state] == char:
                    state += 1
                if state == len(stop):
                    if armed:
                        return stop, at + 1
                    state = fallback[state - 1]
                states[i] = state
        self.held = max(states)
        return None


def fallbacks(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`: the length of its longest proper suffix that is also a prefix."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return tuple(table)


class Detokenizer:
    """Decoder and stop strings of one sequence. `take` gives what may be shown and was not shown yet."""

    __slots__ = ("_decoder", "_include_stop", "_matcher", "_min_tokens", "_num_tokens", "_ready", "_tail")

    def __init__(self, decoder: Decoder, stops: Sequence[str], include_stop: bool, min_tokens: int) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stops) if stops else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._ready: list[str] = []  # settled, not taken yet
        self._tail = ""  # held back: may begin a stop string that is not to be shown

    def push(self, token_id: int) -> str | None:
        """Add one token; the stop string that it completed, if any: nothing may be pushed after that."""
        self._num_tokens += 1
        return self._append(self._decoder.step(token_id), self._num_tokens > self._min_tokens)

    def skip(self) -> None:
        """Count a token that gives no text (the stop token itself)."""
        self._num_tokens += 1

    def finish(self) -> str | None:
        """No token follows: show everything held back. A stop string may still be completed by it."""
        stop = self._append(self._decoder.flush(), self._num_tokens > self._min_tokens)
        if self._tail:
            self._ready.append(self._tail)
            self._tail = ""
        return stop

    def _append(self, text: str, armed: bool) -> str | None:
        if not text:
            return None
        if self._matcher is None:
            self._ready.append(text)
            return None
        found = self._matcher.feed(text, armed)
        if found is not None:
            stop, end = found
            whole = self._tail + text[:end]
            self._tail = ""
            self._ready.append(whole if self._include_stop else whole[: len(whole) - len(stop)])
            return stop
        if self._include_stop:
            self._ready.append(text)
            return None
        whole = self._tail + text
        settled = len(whole) - self._matcher.held
        self._ready.append(whole[:settled])
        self._tail = whole[settled:]
        return None

    def take(self) -> str:
        """Text that is settled and was not taken yet."""
        if not self._ready:
            return ""
        text = self._ready[0] if len(self._ready) == 1 else "".join(self._ready)
        self._ready = []
        return text
