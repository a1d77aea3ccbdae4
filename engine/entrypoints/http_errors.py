"""Errors as clients see them: the OpenAI body, a stable code, and nothing of our insides (R16).

`{"error": {"message", "type", "param", "code"}}`. A RequestError's own message is written for the client; everything
else is answered with a fixed sentence and the request id, and the details go to the log.
"""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from engine.errors import EngineDead, NotFinished, Overloaded, RequestError

BAD_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"


class ModelNotFound(RequestError):
    """Another model's name was asked for."""

    code = "model_not_found"


class TooLarge(RequestError):
    """The body is over the limit."""

    code = "request_too_large"


class TooSlow(RequestError):
    """The body did not arrive in time."""

    code = "request_timeout"


class Draining(RequestError):
    """The server shuts down and takes nothing new."""

    code = "shutting_down"


STATUS: dict[type[RequestError], int] = {
    ModelNotFound: 404,
    TooLarge: 413,
    TooSlow: 408,
    Draining: 503,
    Overloaded: 503,
    NotFinished: 500,
}


@dataclass(frozen=True, slots=True)
class HttpError:
    """What to answer: status and the fields of the error body."""

    status: int
    message: str
    code: str
    type: str = BAD_REQUEST
    param: str | None = None

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


def describe(error: Exception, request_id: str) -> HttpError:
    """The answer for an exception. Unknown ones become a 500 that tells nothing but the id."""
    if isinstance(error, RequestError):
        status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 400)
        return HttpError(status, str(error), error.code, BAD_REQUEST if status < 500 else SERVER_ERROR, error.param)
    if isinstance(error, EngineDead):
        return HttpError(503, "the engine has ended; try again after its restart", error.code, SERVER_ERROR)
    return HttpError(500, f"internal error; the log has details under {request_id}", "internal_error", SERVER_ERROR)
