"""The exception tree of the engine.

* TwinferError                 everything that twinfer raises on purpose
  x RequestError               one request is at fault: answered with `code`, nobody else is disturbed
    + InvalidValue             a field is outside its bounds (names field, value and what is accepted)
    + NeverFits                prompt + output cannot fit the model length or the page pool
    + Unsupported              known by name, not supported here (names the remedy)
    + Overloaded               the waiting queue is full: try again later
    + NotFinished              the engine's fault (a device error, a failed step): may be tried again
  x StartupError               the process cannot start: one line with the cause and the remedy
    + CheckpointError          names file and tensor
    + ConfigError              names the flag or the config field
  x EngineDead                 the engine core has gone; every waiting client gets this once
  x StepFailed                 a runner could not finish a step (see engine/runner.py)
  x InternalError              our own bug: raised by `check`, survives `python -O`
"""

from __future__ import annotations

from typing import NoReturn


class TwinferError(Exception):
    """Base of every error that twinfer raises on purpose."""


class RequestError(TwinferError):
    """One request is at fault. `code` is stable and goes to the client; `param` names the field."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidValue(RequestError, ValueError):
    """A field's value is outside its bounds."""

    code = "invalid_value"


class NeverFits(RequestError, ValueError):
    """The request could never run: longer than the model length or the whole page pool."""

    code = "context_length_exceeded"


class Unsupported(RequestError, NotImplementedError):
    """The option is known by name and is not supported here."""

    code = "unsupported"


class Overloaded(RequestError):
    """The waiting queue is full."""

    code = "overloaded"


class NotFinished(RequestError):
    """The engine could not finish the request through no fault of its own; it may be tried again."""

    code = "engine_error"


class StartupError(TwinferError):
    """The process cannot start. The message is one line: the cause, then the remedy."""


class CheckpointError(StartupError):
    """The checkpoint is damaged or does not match its config. Names the file and the tensor."""


class ConfigError(StartupError, ValueError):
    """A flag or a config.json field cannot be used as given."""


class EngineDead(TwinferError):
    """The engine core process has ended; the request may be retried after a restart."""

    code = "engine_restarted"


class StepFailed(TwinferError):
    """A runner could not finish a step.

    rows: row indexes of the plan that caused it, () when it cannot be told.
    cache_lost: the KV cache contents are gone (JAX donates the cache to a step): the manager drops all
        pages and keys, and every innocent request is recomputed.
    """

    def __init__(self, message: str, *, rows: tuple[int, ...] = (), cache_lost: bool = False) -> None:
        super().__init__(message)
        self.rows = rows
        self.cache_lost = cache_lost


class InternalError(TwinferError):
    """An invariant of ours does not hold."""


def check(condition: object, message: str) -> None:
    """Raise InternalError(message) unless `condition` holds. Survives `python -O`."""
    if not condition:
        fail(message)


def fail(message: str) -> NoReturn:
    raise InternalError(message)


def one_line(text: str, limit: int = 500) -> str:
    """`text` fit for a log: cut at `limit`, control characters escaped. For names that come out of untrusted files."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:limit])
