"""InputProcessor: a prompt and SamplingParams into a checked request for the core, or a typed error that names the
field.

Used by llm.py, async_engine.py and the HTTP routes; thread-safe, so that long prompts are tokenised off the event
loop. Here are checked the limits that depend on the model: ids against the width of the logits, lengths, stop ids,
bad words.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, Unpack

import numpy as np

from engine.core.messages import AddRequest, CoreReady
from engine.errors import InvalidValue, NeverFits, Unsupported
from engine.frontend.chat import ChatTemplate, RenderOptions
from engine.frontend.tokenizer import Tokenizer
from engine.params import SamplingParams
from engine.runner import SamplerLimits

LIMITS = SamplerLimits()
MAX_SALT_BYTES = 128


class TextPrompt(TypedDict, total=False):
    """A prompt as text. cache_salt: prefix-cache entries are only shared among equal salts."""

    prompt: str
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids; `prompt` is its text, if known, and only shown."""

    prompt_token_ids: list[int]
    prompt: str
    cache_salt: str


Prompt = str | list[int] | TextPrompt | TokensPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What requests are checked against."""

    max_model_len: int
    vocab_size: int
    max_logprobs: int
    eos_ids: tuple[int, ...] = ()

    @staticmethod
    def of(ready: CoreReady, eos_ids: Sequence[int]) -> ModelFacts:
        return ModelFacts(
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            max_logprobs=ready.max_logprobs,
            eos_ids=tuple(eos_ids),
        )


@dataclass(slots=True, kw_only=True)
class PreparedRequest:
    """A request that passed every check. `params.max_tokens` is a number that fits the model length."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    stop_ids: list[int]
    eos_ids: list[int]
    bad_word_ids: list[list[int]]
    domain: bytes = b""
    priority: int = 0
    arrival: float = field(default_factory=time.monotonic)

    def message(self, key: int) -> AddRequest:
        return AddRequest(
            key=key,
            prompt=np.asarray(self.prompt_token_ids, "<i4").tobytes(),
            params=self.params,
            stop_ids=self.stop_ids,
            eos_ids=self.eos_ids,
            bad_word_ids=self.bad_word_ids,
            priority=self.priority,
            domain=self.domain,
        )


class InputProcessor:
    """Checks and tokenises for one model."""

    def __init__(self, facts: ModelFacts, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> None:
        self.facts = facts
        self.tokenizer = tokenizer
        self.template = template

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str | None = None,
    ) -> PreparedRequest:
        """Tokenise and check one prompt. Raises RequestError naming the field."""
        text, ids, salt = self.read(prompt)
        if cache_salt is None:
            cache_salt = salt
        ids = self.fit(ids, params)
        facts = self.facts
        room = facts.max_model_len - len(ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        eos = [] if params.ignore_eos else [i for i in facts.eos_ids if i < facts.vocab_size]
        self.check_params(params)
        if not isinstance(priority, int) or isinstance(priority, bool) or not -(2**31) <= priority < 2**31:
            raise InvalidValue("priority: expected an integer of 32 bits", param="priority")
        return PreparedRequest(
            prompt=text,
            prompt_token_ids=ids,
            params=replace(
                params,
                max_tokens=max_tokens,
                min_tokens=min(params.min_tokens, max_tokens),
                logprobs=self.num_logprobs("logprobs", params.logprobs),
                prompt_logprobs=self.num_logprobs("prompt_logprobs", params.prompt_logprobs),
                detokenize=params.detokenize and self.tokenizer is not None,
            ),
            stop_ids=list(dict.fromkeys([*eos, *params.stop_token_ids])),
            eos_ids=eos,
            bad_word_ids=self.bad_words(params.bad_words),
            domain=domain_of(tenant, cache_salt),
            priority=priority,
        )

    def prepare_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, **options: Unpack[RenderOptions]
    ) -> PreparedRequest:
        """As `prepare`, of chat messages. `options` are those of ChatTemplate.render."""
        text, ids = self.encode_chat(messages, **options)
        return self.prepare(TokensPrompt(prompt_token_ids=ids, prompt=text), params)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_special_tokens: bool = False,
        **options: Unpack[RenderOptions],
    ) -> tuple[str, list[int]]:
        """(text, ids) of a chat."""
        if self.template is None:
            raise Unsupported("messages: there is no tokenizer (skip_tokenizer_init); give token ids", param="messages")
        return self.template.encode(self.template.render(messages, **options), add_special_tokens)

    def read(self, prompt: Prompt) -> tuple[str | None, list[int], str | None]:
        """(text if known, ids, salt) of any kind of prompt."""
        if isinstance(prompt, str):
            return prompt, self.encode(prompt), None
        if isinstance(prompt, Mapping):
            return self._read_mapping(prompt)
        if isinstance(prompt, list | tuple | np.ndarray):
            return None, self.check_ids(prompt), None
        raise InvalidValue(
            "prompt: expected a string, a list of token ids, or {'prompt': ...} or {'prompt_token_ids': ...}",
            param="prompt",
        )

    def _read_mapping(self, prompt: Mapping[str, Any]) -> tuple[str | None, list[int], str | None]:
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
        if unknown:
            name = sorted(map(str, unknown))[0]
            raise Unsupported(
                f"prompt: {name[:80]!r} is not supported; give 'prompt' or 'prompt_token_ids'", param="prompt"
            )
        text, ids, salt = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt")
        if salt is not None and not isinstance(salt, str):
            raise InvalidValue("cache_salt: expected a string", param="cache_salt")
        if text is not None and not isinstance(text, str):
            raise InvalidValue("prompt: expected a string", param="prompt")
        if ids is not None:
            return text, self.check_ids(ids), salt
        if text is None:
            raise InvalidValue("prompt: expected 'prompt' or 'prompt_token_ids'", param="prompt")
        return text, self.encode(text), salt

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if self.tokenizer is None:
            raise Unsupported("prompt: there is no tokenizer (skip_tokenizer_init); give token ids", param="prompt")
        return self.tokenizer.encode(text, add_special_tokens)

    def check_ids(self, given: Any, name: str = "prompt_token_ids") -> list[int]:
        """`given` as a list of ints, each in [0, vocabulary)."""
        if isinstance(given, np.ndarray):
            given = given.tolist()
        if not isinstance(given, list | tuple) or not set(map(type, given)) <= {int}:
            raise InvalidValue(f"{name}: expected a list of integers", param=name)
        self.check_range(given, name)
        return list(given)

    def check_range(self, ids: Sequence[int], name: str) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self.facts.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.facts.vocab_size)
            raise InvalidValue(
                f"{name}: {str(wrong)[:24]} is not accepted; expected token ids >= 0 and < {self.facts.vocab_size}",
                param=name,
            )

    def fit(self, ids: list[int], params: SamplingParams) -> list[int]:
        """Truncate as asked for; refuse what cannot run. At least one token of the model length stays for output."""
        length = self.facts.max_model_len
        keep = params.truncate_prompt_tokens
        if keep is not None:
            if keep == -1:
                keep = max(1, length - (params.max_tokens or 1))
            elif keep > length:
                raise InvalidValue(
                    f"truncate_prompt_tokens: {keep} is not accepted; expected at most the model length {length}",
                    param="truncate_prompt_tokens",
                )
            ids = ids[-keep:] if keep else []
        if not ids:
            raise InvalidValue("prompt: it has no tokens; expected at least one", param="prompt")
        if len(ids) >= length:
            raise NeverFits(
                f"prompt: {len(ids)} tokens do not fit the model length of {length} tokens with room for one more",
                param="prompt",
            )
        self.check_range(ids, "prompt")
        return ids

    def check_params(self, params: SamplingParams) -> None:
        """The fields whose limits are the model's."""
        self.check_range(params.stop_token_ids, "stop_token_ids")
        if params.allowed_token_ids is not None:
            self.check_range(params.allowed_token_ids, "allowed_token_ids")
        if params.logit_bias:
            self.check_range(list(params.logit_bias), "logit_bias")
        if params.stop and self.tokenizer is None:
            raise Unsupported("stop: there is no tokenizer (skip_tokenizer_init); use stop_token_ids", param="stop")

    def num_logprobs(self, name: str, wanted: int | None) -> int | None:
        """-1 means the whole vocabulary; refuse more than --max-logprobs."""
        if wanted is None:
            return None
        number = self.facts.vocab_size if wanted == -1 else wanted
        if number > self.facts.max_logprobs:
            raise InvalidValue(
                f"{name}: {wanted} is not accepted; expected at most {self.facts.max_logprobs} (--max-logprobs)",
                param=name,
            )
        return number

    def bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Token sequences of each word, at the start of a text and after a space."""
        if words and self.tokenizer is None:
            raise Unsupported("bad_words: there is no tokenizer (skip_tokenizer_init)", param="bad_words")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word.lstrip() or word, " " + word.lstrip()):
                ids = self.encode(text, add_special_tokens=False)
                if len(ids) > LIMITS.max_bad_word_len:
                    raise InvalidValue(
                        f"bad_words: {word[:40]!r} has {len(ids)} tokens; at most {LIMITS.max_bad_word_len}",
                        param="bad_words",
                    )
                self.check_range(ids, "bad_words")
                if ids:
                    found[tuple(ids)] = None
        return [list(ids) for ids in found]


def domain_of(tenant: str, salt: str | None) -> bytes:
    """What separates prefix-cache entries: tenant and salt, each framed by its own hash (R17). b"" for neither."""
    if salt is not None and len(salt.encode(errors="replace")) > MAX_SALT_BYTES:
        raise InvalidValue(f"cache_salt: longer than {MAX_SALT_BYTES} bytes", param="cache_salt")
    if not tenant and not salt:
        return b""
    parts = (hashlib.sha256(part.encode(errors="replace")).digest() for part in (tenant, salt or ""))
    return hashlib.sha256(b"".join(parts)).digest()
