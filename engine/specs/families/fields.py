"""Typed reading of a config.json: each getter names the field, its value and what is accepted when it refuses.

A parser in this folder reads every value through `Fields`, so that a wrong type, an impossible number or a value that
the family does not know ends as a ConfigError and never as a wrong model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from engine.errors import ConfigError, one_line


class Fields:
    """One JSON object of a config, with the path to it for messages."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def refuse(self, name: str, accepted: str) -> NoReturn:
        shown = repr(self.values.get(name))
        if len(shown) > 120:
            shown = shown[:117] + "..."
        given = f"{shown} is not accepted" if name in self.values else "is missing"
        raise ConfigError(one_line(f"{self.where}: {name}: {given}; expected {accepted}", 1000))

    def has(self, name: str) -> bool:
        """Present and not null."""
        return self.values.get(name) is not None

    def optional_integer(self, name: str, minimum: int = 1, maximum: int = 2**31 - 1) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some exporters write 4096.0
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.refuse(name, f"an integer from {minimum} to {maximum}")
        return value

    def integer(self, name: str, default: int | None = None, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        value = self.optional_integer(name, minimum, maximum)
        if value is None:
            if default is None:
                self.refuse(name, f"an integer from {minimum} to {maximum}")
            return default
        return value

    def optional_number(self, name: str, minimum: float = 0.0, *, open_min: bool = True) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < minimum or (open_min and value == minimum):
            self.refuse(name, f"a number {'>' if open_min else '>='} {minimum:g}")
        return float(value)

    def number(self, name: str, default: float | None = None, minimum: float = 0.0) -> float:
        value = self.optional_number(name, minimum)
        if value is None:
            if default is None:
                self.refuse(name, f"a number > {minimum:g}")
            return default
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def choice(self, name: str, known: Mapping[str, str], default: str) -> str:
        """The value mapped through `known`."""
        value = self.values.get(name)
        if value is None:
            value = default
        if not isinstance(value, str) or value not in known:
            self.refuse(name, "one of " + ", ".join(known))
        return known[value]

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        value = self.values.get(name)
        accepted = f"a list of {length} numbers > 0 (half of the rotary size)"
        if not isinstance(value, list) or len(value) != length:
            self.refuse(name, accepted)
        for item in value:
            if isinstance(item, bool) or not isinstance(item, (int, float)) or not 0 < item < math.inf:
                self.refuse(name, accepted)
        return tuple(float(item) for item in value)

    def table(self, name: str) -> Fields | None:
        """A nested object, None when absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "an object or null")
        return Fields(value, f"{self.where}: {name}")

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """An id, a list of ids, or null; every id inside the vocabulary."""
        value = self.values.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for item in ids:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                self.refuse(name, f"token ids from 0 to vocab_size - 1 = {vocab_size - 1}")
        return tuple(dict.fromkeys(ids))

    def neutral(self, name: str, accepted: Iterable[Any], reason: str) -> None:
        """Refuse the field unless it is absent, null or one of the values that change nothing."""
        value = self.values.get(name)
        if value is not None and not any(value == good and type(value) is type(good) for good in accepted):
            good = ", ".join(str(item).lower() if isinstance(item, bool) else repr(item) for item in accepted)
            self.refuse(name, f"null{' or ' + good if good else ''} ({reason})")
