"""SamplingParams and the one bounds table that every front door uses (R2 of hardening.md).

Field names, defaults and meanings are vLLM's, so that a switch is a change of one import. `BOUNDS` is the single table
of types and limits: HTTP, the offline API and the engine's own admission all call `validate`. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from operator import attrgetter
from typing import Any

from engine.errors import InvalidValue


class RequestOutputKind(Enum):
    """What each RequestOutput of a stream carries."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # one output, at the end


@dataclass(frozen=True, slots=True)
class Bound:
    """Limits of one field. Numbers are closed intervals unless `open_min`. `items` bounds list elements."""

    type: type
    minimum: float | None = None
    maximum: float | None = None
    open_min: bool = False
    optional: bool = False
    max_items: int | None = None  # list length or string length
    items: Bound | None = None

    def accepted(self) -> str:
        """What would be accepted, for error texts."""
        names: dict[type, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
        name = names.get(self.type, "an object" if self.type is dict else "a list")
        low = None if self.minimum is None else f"{'>' if self.open_min else '>='} {shown(self.minimum)}"
        high = None if self.maximum is None else f"<= {shown(self.maximum)}"
        limits = " and ".join(part for part in (low, high) if part)
        text = f"{name} {limits}".strip()
        if self.max_items is not None:
            text += f" of at most {self.max_items} {'characters' if self.type is str else 'entries'}"
        if self.items is not None:
            text += f", each {self.items.accepted()}"
        return text + (" or null" if self.optional else "")


def shown(limit: float) -> str:
    """A limit in error texts: integers in full."""
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


TOKEN_ID = Bound(int, 0, 2**31 - 1)
STOP_STRING = Bound(str, max_items=256)

BOUNDS: dict[str, Bound] = {
    "n": Bound(int, 1, 16),
    "temperature": Bound(float, 0.0, 100.0),
    "top_p": Bound(float, 0.0, 1.0, open_min=True),
    "top_k": Bound(int, -1, 2**31 - 1),  # -1 and 0 switch it off
    "min_p": Bound(float, 0.0, 1.0),
    "presence_penalty": Bound(float, -2.0, 2.0),
    "frequency_penalty": Bound(float, -2.0, 2.0),
    "repetition_penalty": Bound(float, 0.0, 100.0, open_min=True),
    "seed": Bound(int, -(2**63), 2**63 - 1, optional=True),
    "stop": Bound(list, max_items=16, items=STOP_STRING),
    "stop_token_ids": Bound(list, max_items=64, items=TOKEN_ID),
    "bad_words": Bound(list, max_items=64, items=STOP_STRING),
    "ignore_eos": Bound(bool),
    "max_tokens": Bound(int, 1, 2**31 - 1, optional=True),
    "min_tokens": Bound(int, 0, 2**31 - 1),
    "logprobs": Bound(int, -1, 2**31 - 1, optional=True),  # capped by --max-logprobs at admission; -1 = all
    "prompt_logprobs": Bound(int, -1, 2**31 - 1, optional=True),
    "detokenize": Bound(bool),
    "skip_special_tokens": Bound(bool),
    "spaces_between_special_tokens": Bound(bool),
    "include_stop_str_in_output": Bound(bool),
    "truncate_prompt_tokens": Bound(int, -1, 2**31 - 1, optional=True),  # -1 = the model length
    "logit_bias": Bound(dict, max_items=1024, optional=True, items=Bound(float, -100.0, 100.0)),
    "allowed_token_ids": Bound(list, max_items=2**20, optional=True, items=TOKEN_ID),
    "skip_reading_prefix_cache": Bound(bool, optional=True),
}


def has_type(value: Any, wanted: type) -> bool:
    """A bool is no number here, an int is a float, a float is finite, a tuple is a list."""
    if wanted is float:
        return has_type(value, int) or (isinstance(value, float) and math.isfinite(value))
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, (list, tuple) if wanted is list else wanted)


def in_range(value: Any, bound: Bound) -> bool:
    """Whether a value of the right type is inside the limits."""
    if bound.type in (int, float):
        if bound.minimum is not None and (value <= bound.minimum if bound.open_min else value < bound.minimum):
            return False
        return bound.maximum is None or bool(value <= bound.maximum)
    return bound.max_items is None or len(value) <= bound.max_items


def check_value(name: str, value: Any, bound: Bound) -> None:
    """Raise InvalidValue naming field, value and what is accepted, unless `value` is inside `bound`."""
    if value is None and bound.optional:
        return
    if not (has_type(value, bound.type) and in_range(value, bound)):
        shown = repr(value) if not isinstance(value, (list, dict, str)) or len(value) <= 8 else f"{len(value)} entries"
        raise InvalidValue(f"{name}: {shown} is not accepted; expected {bound.accepted()}", param=name)
    if bound.items is not None:
        for i, item in enumerate(value.values() if isinstance(value, dict) else value):
            check_value(f"{name}[{i}]", item, bound.items)


@dataclass(slots=True)
class SamplingParams:
    """How to sample one request. Same fields and defaults as vLLM's class of this name.

    Raises InvalidValue (a ValueError) for a value outside BOUNDS.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    bad_words: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        if self.stop is None:
            self.stop = []
        elif isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.stop_token_ids is None:
            self.stop_token_ids = []
        if self.bad_words is None:
            self.bad_words = []
        if self.logit_bias is not None and isinstance(self.logit_bias, dict):
            try:
                self.logit_bias = {int(k): v for k, v in self.logit_bias.items()}
            except (TypeError, ValueError):
                raise InvalidValue("logit_bias: keys must be token ids", param="logit_bias") from None
        validate(self)

    @property
    def uses_history(self) -> bool:
        """Whether the device needs the token history (penalties and bad words)."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return bool(self.bad_words) or penalties != (0, 0, 1)

    @property
    def is_greedy(self) -> bool:
        """True when plain argmax of the raw logits is the answer: no processor changes it."""
        return (
            self.temperature == 0
            and not self.uses_history
            and not self.logit_bias
            and self.allowed_token_ids is None
            and self.min_tokens == 0
        )


def validate(params: SamplingParams) -> None:
    """Check every field against BOUNDS and the fields against each other. Raises InvalidValue."""
    for (name, bound, default), value in zip(CHECKS, bounded_fields(params), strict=True):
        # most values are the default, which is inside its bound; of the same type, for True == 1
        if value is not default and (type(value) is not type(default) or value != default):
            check_value(name, value, bound)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidValue(
            f"min_tokens: {params.min_tokens} is more than max_tokens {params.max_tokens}", param="min_tokens"
        )
    if any(not s for s in params.stop):
        raise InvalidValue("stop: '' is not accepted; expected non-empty strings", param="stop")
    if any(not s for s in params.bad_words):
        raise InvalidValue("bad_words: '' is not accepted; expected non-empty strings", param="bad_words")
    if params.stop and not params.detokenize:
        raise InvalidValue("stop: strings need detokenize=True; use stop_token_ids", param="stop")
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        raise InvalidValue(
            "allowed_token_ids: [] is not accepted; expected at least one id or null", param="allowed_token_ids"
        )


CHECKS = tuple(
    (f.name, BOUNDS[f.name], f.default_factory() if callable(f.default_factory) else f.default)
    for f in fields(SamplingParams)
    if f.name in BOUNDS
)
bounded_fields = attrgetter(*(name for name, _, _ in CHECKS))
"""The values of the fields in CHECKS."""

UNBOUNDED = {"output_kind"}
"""Fields of SamplingParams that have no row in BOUNDS, with their own type check."""


def fields_without_bounds() -> set[str]:
    """SamplingParams fields that nobody gave a row in BOUNDS: a test keeps this empty."""
    return {f.name for f in fields(SamplingParams)} - set(BOUNDS) - UNBOUNDED
