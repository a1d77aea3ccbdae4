"""Random bodies and requests: the server answers each with a status of its table, never a 500, and tells no insides."""

from __future__ import annotations

import re
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.entrypoints.fields import CHAT, COMPLETION, DETOKENIZE, IGNORED, REFUSED, TOKENIZE
from tests.engine.entrypoints.alphabet_engine import AlphabetEngine
from tests.engine.entrypoints.conftest import App

INSIDES = re.compile(r"0x[0-9a-f]{6,}|/home|site-packages|line \d+|Traceback|<[a-z_.]+ object")
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 20) | st.floats(allow_nan=False)
    | st.text(max_size=12)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PROMPTS = VALUES | st.just("ab") | st.just([[1, 2], [3]]) | st.lists(st.integers(0, 255), min_size=1, max_size=4)
CONTENT = VALUES | st.just("hi") | st.just([{"type": "text", "text": "x"}])
MESSAGES = (
    VALUES
    | st.just([{"role": "user", "content": "x"}])
    | st.lists(
        st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "x"]), CONTENT, max_size=3)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]), "content": CONTENT}),
        max_size=3,
    )
)
TABLES = {
    "/v1/completions": (COMPLETION, {"prompt": PROMPTS}),
    "/v1/chat/completions": (CHAT, {"messages": MESSAGES}),
    "/tokenize": (TOKENIZE, {"prompt": PROMPTS, "messages": MESSAGES}),
    "/detokenize": (DETOKENIZE, {"tokens": PROMPTS}),
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from(sorted(TABLES)))
    table, own = TABLES[path]
    names = st.sampled_from(sorted({*table, *IGNORED, *REFUSED, "nonsense"}))
    body = draw(st.dictionaries(names, VALUES, max_size=4))
    body |= {name: draw(values) for name, values in own.items() if draw(st.booleans()) or len(own) == 1}
    body.setdefault("max_tokens", draw(st.integers(1, 3))) if "max_tokens" in table else None
    return path, body


@settings(max_examples=150, deadline=None)
@given(requests())
async def test_no_body_makes_a_server_error(case: tuple[str, dict[str, Any]]) -> None:
    path, body = case
    app = App(AlphabetEngine(max_model_len=32))
    try:
        content = orjson.dumps(body)
    except TypeError:  # lone surrogates
        return
    answer = await app.client.post(path, content=content)
    assert answer.status_code in (200, 400, 404), answer.text
    assert not INSIDES.search(answer.text) or answer.status_code == 200, answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert not app.engine.running


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(TABLES)), st.binary(max_size=60))
async def test_no_bytes_make_a_server_error(path: str, body: bytes) -> None:
    answer = await App(AlphabetEngine()).client.post(path, content=body)
    assert answer.status_code == 400
