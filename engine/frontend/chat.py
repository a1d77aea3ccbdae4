"""Chat messages to a prompt: the checkpoint's (or the operator's) template, rendered in jinja's sandbox by
transformers.

Never a template of a request (R12). Messages come as OpenAI spells them: parts of text are joined, tool-call
arguments are parsed for the template, and every string in them is guarded, so that a special token a user spells
stays plain text. Every error that a message can cause is an InvalidValue or Unsupported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import ConfigError, InvalidValue, Unsupported
from engine.frontend.tokenizer import Tokenizer, first_line

MAX_RENDERED_CHARS = 1 << 25
MAX_DEPTH = 64  # of nested message fields
# what a template may raise over the messages it was given
TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Names a template reads that are not a client's to set: they have an argument of their own, or are functions."""


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: transformers' mark of what an assistant wrote; parsed, not used."""

    tags = {"generation"}  # noqa: RUF012  as jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class RenderOptions(TypedDict, total=False):
    """Keyword arguments of ChatTemplate.render."""

    tools: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any] | None


class ChatTemplate:
    """One template and the tokenizer it writes for. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        """template None: the checkpoint's own, if it has one. Raises ConfigError for one that does not parse."""
        self._tokenizer = tokenizer
        source = tokenizer.hf.chat_template if template is None else template
        if isinstance(source, dict):  # several by name; the one for tools is picked by transformers
            source = source.get("default") or next(iter(source.values()), None)
        self._given = template
        self.source: str | None = source
        self._variables = frozenset() if source is None else template_variables(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a chat, markers of guarded tokens in it. Raises InvalidValue, Unsupported."""
        if self.source is None:
            raise Unsupported(
                "messages: the model has no chat template; give one with --chat-template", param="messages"
            )
        if add_generation_prompt and continue_final_message:
            raise InvalidValue(
                "continue_final_message: true needs add_generation_prompt false", param="continue_final_message"
            )
        kwargs = self._check_kwargs(chat_template_kwargs or {})
        conversation = [self._guarded(message) for message in normalise(messages)]
        try:
            text = self._tokenizer.hf.apply_chat_template(
                conversation,
                tools=None if not tools else [self._guarded(tool) for tool in tools],
                chat_template=self._given,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **self._guarded(kwargs),
            )
        except TEMPLATE_ERRORS as error:
            raise InvalidValue(
                f"messages: the chat template refused them: {first_line(error)}", param="messages"
            ) from None
        if len(text) > MAX_RENDERED_CHARS:
            raise InvalidValue(
                f"messages: {len(text)} characters are too many; at most {MAX_RENDERED_CHARS}", param="messages"
            )
        return str(text)

    def encode(self, rendered: str, add_special_tokens: bool = False) -> tuple[str, list[int]]:
        """(text, ids) of what `render` gave. The template writes bos itself, so nothing is added unless asked for."""
        return self._tokenizer.encode_guarded(rendered, add_special_tokens)

    def _check_kwargs(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        accepted = self._variables - RESERVED - set(self._tokenizer.hf.special_tokens_map)
        for name in kwargs:
            if name not in accepted:
                shown = ", ".join(sorted(accepted)) or "none"
                raise InvalidValue(
                    f"chat_template_kwargs: {name!r} is not a variable of the template; it has: {shown}",
                    param="chat_template_kwargs",
                )
        return kwargs

    def _guarded(self, value: Any, depth: int = 0) -> Any:
        """A copy of message fields with every string guarded."""
        if depth > MAX_DEPTH:
            raise InvalidValue(f"messages: nested deeper than {MAX_DEPTH}", param="messages")
        if isinstance(value, str):
            return self._tokenizer.guard(value)
        if isinstance(value, Mapping):
            return {str(k): self._guarded(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(v, depth + 1) for v in value]
        return value


def template_variables(source: str) -> frozenset[str]:
    """Names that a template reads from outside. Raises ConfigError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(source))) - set(environment.globals)
    except jinja2.TemplateError as error:
        raise ConfigError(f"--chat-template: the template does not parse: {first_line(error)}") from None


def read_template(given: str | None) -> str | None:
    """--chat-template: a file, or the template itself when it holds jinja. Raises ConfigError."""
    if given is None or "{" in given or "\n" in given:
        return given
    path = Path(given)
    if not path.is_file():
        raise ConfigError(f"--chat-template: {given!r} is neither a file nor a template")
    return path.read_text(encoding="utf-8")


def normalise(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI messages as templates expect them. Raises InvalidValue, Unsupported."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidValue("messages: expected a list of at least one message", param="messages")
    return [normalise_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def normalise_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidValue(f"{where}: expected an object with a string 'role'", param=where)
    plain = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list | tuple):
        plain["content"] = "\n".join(part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is None:
        plain["content"] = ""  # an assistant that only called tools: templates want a string
    elif not isinstance(content, str):
        raise InvalidValue(f"{where}.content: expected a string or a list of parts", param=f"{where}.content")
    if plain.get("tool_calls"):
        plain["tool_calls"] = [tool_call(call, f"{where}.tool_calls") for call in plain["tool_calls"]]
    return plain


def part_text(part: Any, where: str) -> str:
    """The text of one content part."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InvalidValue(f"{where}: expected an object with 'type' and 'text'", param=where)
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise Unsupported(f"{where}: parts of type {str(kind)[:40]!r} are not supported; only text", param=where)
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise InvalidValue(f"{where}.text: expected a string", param=where)
    return text


def tool_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object: templates write them out as JSON themselves."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise InvalidValue(f"{where}: expected objects with a 'function'", param=where)
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments else {}
        except (json.JSONDecodeError, RecursionError):
            raise InvalidValue(f"{where}.function.arguments: not valid JSON", param=where) from None
    return {**call, "function": function}
