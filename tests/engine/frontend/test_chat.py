"""Chat templates: equal to transformers where nobody plays tricks; spelled special tokens stay text; typed errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, InvalidValue, RequestError, Unsupported
from engine.frontend.chat import ChatTemplate, read_template
from engine.frontend.tokenizer import Tokenizer
from tests.engine.frontend.checkpoints import SPECIALS

KINDS = ["byte_level", "sentencepiece_like"]


def user(content: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(contents=st.lists(st.text(max_size=20), min_size=1, max_size=3), ask=st.booleans())
def test_ids_are_those_of_transformers(
    tokenizers: dict[str, Tokenizer], kind: str, contents: list[str], ask: bool
) -> None:
    tokenizer = tokenizers[kind]
    template = ChatTemplate(tokenizer)
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
    text, ids = template.encode(template.render(messages, add_generation_prompt=ask))
    assert text == tokenizer.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    assert ids == tokenizer.hf.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(SPECIALS), st.text(max_size=6)), max_size=6))
def test_spelled_special_tokens_stay_text(tokenizers: dict[str, Tokenizer], kind: str, parts: list[str]) -> None:
    tokenizer = tokenizers[kind]
    template = ChatTemplate(tokenizer)
    said = "".join(parts).strip()
    text, ids = template.encode(template.render([*user(said), *user(said, "<|im_end|>" + said)]))
    plain = template.encode(template.render([*user("x"), *user("x", "y")]))[1]
    for special in tokenizer.special_ids:
        assert ids.count(special) == plain.count(special)
    assert said in text, "the text itself is unchanged"
    if kind == "byte_level":  # the other one writes spaces its own way
        assert said in tokenizer.decode(ids)


def test_guarding_changes_nothing_but_the_spelled_token(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    template = ChatTemplate(tokenizer)
    ids = template.encode(template.render(user("The quick <|im_end|>")))[1]
    spelled = [i for c in "<|im_end|>" for i in tokenizer.encode(c, False)]
    head = template.encode(template.render(user("The quick @")))[1]
    assert ids[:6] == head[:6]
    assert tokenizer.decode([i for i in ids if i not in tokenizer.special_ids]).count("<|im_end|>") == 1
    assert len(ids) <= len(head) + len(spelled)


def test_template_variables_and_reserved_names(tokenizers: dict[str, Tokenizer]) -> None:
    template = ChatTemplate(tokenizers["byte_level"])
    assert template.render(user("x")).endswith("<nothink>")
    assert template.render(user("x"), chat_template_kwargs={"thinking": True}).endswith("assistant\n")
    for name in ("tokenize", "chat_template", "messages", "return_dict", "add_generation_prompt", "unknown"):
        with pytest.raises(InvalidValue, match=f"{name}.*thinking"):
            template.render(user("x"), chat_template_kwargs={name: True})


def test_only_a_templates_own_variables_can_be_set(tokenizers: dict[str, Tokenizer]) -> None:
    source = "{{ bos_token }}{% if x %}{{ strftime_now('%Y') }}{% endif %}{{ documents }}{{ raise_exception('no') }}"
    template = ChatTemplate(tokenizers["byte_level"], source)
    for name in ("bos_token", "strftime_now", "raise_exception", "y"):
        with pytest.raises(InvalidValue, match=r"it has: documents, x$"):
            template.render(user("x"), chat_template_kwargs={name: "<|im_end|>"})


def test_continue_final_message(tokenizers: dict[str, Tokenizer]) -> None:
    template = ChatTemplate(tokenizers["byte_level"])
    messages = [*user("x"), *user("def mean(", "assistant")]
    text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("assistant\ndef mean(")
    with pytest.raises(InvalidValue, match="continue_final_message"):
        template.render(messages, continue_final_message=True)


def test_parts_and_tool_calls(tokenizers: dict[str, Tokenizer]) -> None:
    calls = "{% for t in m.tool_calls %}{{ t.function.arguments.a }}{% endfor %}"
    source = "{% for m in messages %}{{ m.content }}" + calls + "{% endfor %}"
    template = ChatTemplate(tokenizers["byte_level"], source)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 5}'}}
    messages = [*user(parts), {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert template.render(messages) == "one\ntwo5"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        {"role": "user"},
        [1],
        [{"content": "x"}],
        [{"role": 3, "content": "x"}],
        user(5),
        user([5]),
        user([{"type": "text"}]),
        user([{"type": "image_url", "image_url": {"url": "x"}}]),
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [3]}],
    ],
)
def test_bad_messages_name_the_field(tokenizers: dict[str, Tokenizer], messages: Any) -> None:
    with pytest.raises(RequestError) as raised:
        ChatTemplate(tokenizers["byte_level"]).render(messages)
    assert str(raised.value.param).startswith("messages")


def test_deep_nesting_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    lone = user("\ud800")
    with pytest.raises(InvalidValue, match="surrogate"):
        template = ChatTemplate(tokenizers["byte_level"])
        template.encode(template.render(lone))
    with pytest.raises(InvalidValue, match="nested"):
        ChatTemplate(tokenizers["byte_level"]).render([{"role": "user", "content": "x", "extra": deep}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_a_request_error(tokenizers: dict[str, Tokenizer], source: str) -> None:
    with pytest.raises(InvalidValue, match="the chat template refused them"):
        ChatTemplate(tokenizers["byte_level"], source).render(user("x"))


def test_missing_and_broken_templates(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not parse"):
        ChatTemplate(tokenizers["byte_level"], "{% for %}")
    with pytest.raises(ConfigError, match="neither a file nor"):
        read_template("no/such/file")
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert read_template(str(tmp_path / "t.jinja")) == "{{ messages }}"
    assert read_template("{{ x }}") == "{{ x }}"
    bare = ChatTemplate(tokenizers["byte_level"], "")
    bare.source = None
    with pytest.raises(Unsupported, match="--chat-template"):
        bare.render(user("x"))
