"""JSON bodies from strangers: one reading, or a refusal.

Refused: duplicate keys, NaN and infinities (spelled or by overflow), nesting deeper than MAX_DEPTH, anything but an
object at the top. So two programs that look at the same body can never see two different requests.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from engine.errors import RequestError

MAX_DEPTH = 64


class BadJson(RequestError):
    """The body is not JSON that we accept."""

    code = "invalid_json"


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as a dict. Raises BadJson."""
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except BadJson:
        raise
    except RecursionError:
        raise BadJson(f"the body nests deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError:
        raise BadJson("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadJson(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:
        raise BadJson("the body holds an integer of too many digits") from None
    if not isinstance(value, dict):
        raise BadJson("the body must be a JSON object")
    # a document with at most MAX_DEPTH opening brackets cannot nest deeper: the common case needs no walk
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadJson(f"the key {key[:64]!r} occurs twice in one object")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise BadJson(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadJson(f"the number {text[:32]} is too large")
    return value


def _check_depth(value: Any) -> None:
    """Level by level, so that no recursion limit is met."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise BadJson(f"the body nests deeper than {MAX_DEPTH} levels")
