"""Incremental text: equal to whole decoding, however it is cut; stop strings found over every boundary."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.frontend.detokenizer import Decoder, Detokenizer, PieceDecoder, StopMatcher, WindowDecoder
from engine.frontend.tokenizer import Tokenizer
from tests.engine.frontend.checkpoints import KINDS

EXAMPLES = settings(max_examples=150, deadline=None)
NONE: frozenset[int] = frozenset()
IDS = st.lists(st.integers(0, 450), max_size=60)  # some ids beyond the vocabulary: they have no text


def decoder_of(tokenizer: Tokenizer, skip_special: bool = True, at_start: bool = True) -> Decoder:
    hidden = tokenizer.special_ids if skip_special else NONE
    if tokenizer.pieces is not None:
        return PieceDecoder(tokenizer.pieces, hidden, at_start)
    return WindowDecoder(tokenizer, hidden, (), False)


def decode_all(decoder: Decoder, ids: list[int]) -> str:
    return "".join(map(decoder.step, ids)) + decoder.flush()


@pytest.mark.parametrize("skip_special", [True, False])
@EXAMPLES
@given(ids=IDS)
def test_byte_level_equals_whole_decoding(tokenizers: dict[str, Tokenizer], skip_special: bool, ids: list[int]) -> None:
    tokenizer = tokenizers["byte_level"]
    assert decode_all(decoder_of(tokenizer, skip_special), ids) == tokenizer.decode(ids, skip_special)


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(text=st.text(max_size=60))
def test_real_text_equals_whole_decoding(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert decode_all(decoder_of(tokenizer), ids) == tokenizer.decode(ids, skip_special_tokens=True)


@EXAMPLES
@given(ids=IDS)
def test_byte_fallback_equals_whole_decoding_up_to_broken_bytes(
    tokenizers: dict[str, Tokenizer], ids: list[int]
) -> None:
    # the library turns a run of bytes that is not UTF-8 as a whole into one U+FFFD a byte, which no stream can know
    # in advance: good characters of such a run are kept here
    tokenizer = tokenizers["sentencepiece_like"]
    whole, ours = tokenizer.decode(ids, skip_special_tokens=True), decode_all(decoder_of(tokenizer), ids)
    if "�" not in whole:
        assert ours == whole
    assert len(ours.encode()) <= len(whole.encode())


def test_a_leading_space_goes_only_at_the_very_start(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece_like"]
    ids = tokenizer.encode("The fox", add_special_tokens=False)
    assert decode_all(decoder_of(tokenizer), ids) == "The fox"
    assert decode_all(decoder_of(tokenizer, at_start=False), ids) == " The fox"


def test_incomplete_characters_are_held_back_then_flushed(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = [tokenizer.encode(chr(b), False)[0] for b in b"a"] + byte_ids(tokenizer, "好".encode())
    decoder = decoder_of(tokenizer)
    assert [decoder.step(i) for i in ids] == ["a", "", "", "好"]
    assert [decoder.step(i) for i in ids[:-1]] == ["a", "", ""]
    assert decoder.flush() == "�"


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One id a byte."""
    assert tokenizer.pieces is not None
    found = {tokenizer.token_bytes(i): i for i in range(tokenizer.size) if len(tokenizer.token_bytes(i)) == 1}
    return [found[bytes([b])] for b in data]


def test_spaces_between_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["word_piece"]
    ids = [*tokenizer.encode("fox", False), 2, 3, *tokenizer.encode("dog", False)]
    assert decode_all(WindowDecoder(tokenizer, NONE, (), False), ids) == tokenizer.decode(ids)
    joined = decode_all(WindowDecoder(tokenizer, NONE, (), True), ids)
    assert "<|im_start|><|im_end|>" in joined


STOPPY = st.text(alphabet="abc\u00e9", min_size=1, max_size=5)


@EXAMPLES
@given(stops=st.lists(STOPPY, min_size=1, max_size=4), pieces=st.lists(st.text(alphabet="abc\u00e9", max_size=4)))
def test_the_first_stop_string_to_end_is_found_however_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    text, matcher, seen = "".join(pieces), StopMatcher(stops), 0
    ends = sorted((text.find(stop) + len(stop), i) for i, stop in enumerate(stops) if stop in text)
    for piece in pieces:
        found = matcher.feed(piece, True)
        if found is not None:
            assert (seen + found[1], stops.index(found[0])) == (ends[0][0], stops.index(stops[ends[0][1]]))
            return
        seen += len(piece)
        # exactly what might still become a stop string is held back
        longest = max((n for s in stops for n in range(1, len(s)) if text[:seen].endswith(s[:n])), default=0)
        assert matcher.held == longest
    assert not ends


@pytest.mark.parametrize("include", [True, False])
@EXAMPLES
@given(data=st.data())
def test_streamed_text_is_whole_text(tokenizers: dict[str, Tokenizer], include: bool, data: st.DataObject) -> None:
    """Random bytes and characters, random stop strings, reads at random places: F-2."""
    tokenizer = tokenizers["byte_level"]
    text = data.draw(st.text(alphabet="ab \u00e9\u597d\U0001f44b", max_size=30))
    broken = data.draw(st.lists(st.integers(0, 255), max_size=3))
    ids = byte_ids(tokenizer, text.encode() + bytes(broken) + text.encode())
    stops = data.draw(st.lists(st.text(alphabet="ab \u00e9\u597d", min_size=1, max_size=4), max_size=3))
    min_tokens = data.draw(st.integers(0, 6))

    def run(read_at: set[int]) -> tuple[list[str], str | None]:
        detokenizer = Detokenizer(decoder_of(tokenizer), stops, include, min_tokens)
        parts = []
        for i, token in enumerate(ids):
            stop = detokenizer.push(token)
            if stop is not None:
                return [*parts, detokenizer.take()], stop
            if i in read_at:
                parts.append(detokenizer.take())
        stop = detokenizer.finish()
        return [*parts, detokenizer.take()], stop

    whole, stop = run(set())
    streamed, streamed_stop = run(set(data.draw(st.lists(st.integers(0, 80)))))
    assert ("".join(streamed), streamed_stop) == (whole[0], stop)
    everything = tokenizer.decode(ids)
    assert everything.startswith(whole[0])
    if stop is None:
        assert whole[0] == everything
    elif include:
        assert whole[0].endswith(stop)
    else:
        assert everything[len(whole[0]) :].startswith(stop)


def test_min_tokens_lets_early_stop_strings_pass(tokenizers: dict[str, Tokenizer]) -> None:
    ids = byte_ids(tokenizers["byte_level"], b"xSTOPySTOPz")
    detokenizer = Detokenizer(decoder_of(tokenizers["byte_level"]), ["STOP"], False, 5)
    stops = [detokenizer.push(i) for i in ids[:10]]
    assert stops == [None] * 9 + ["STOP"]
    assert detokenizer.take() == "xSTOPy"


@pytest.mark.parametrize("kind", KINDS)
def test_cost_of_a_token_does_not_grow(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    # bytes that never become a character are the worst case
    ids = [i % 250 + 60 for i in range(0, 40000, 7)]

    def seconds(count: int) -> float:
        detokenizer = Detokenizer(decoder_of(tokenizer), ["zzzzzzzzq", "\n\n\n\n"], False, 0)
        begun = time.thread_time()
        for i in range(count):
            detokenizer.push(ids[i % len(ids)])
            detokenizer.take()
        return time.thread_time() - begun

    seconds(1000)
    short = min(seconds(1000) for _ in range(3))
    # eight times the tokens; were each to cost what came before it, it would be 64 times
    assert min(seconds(8000) for _ in range(3)) < 32 * short
