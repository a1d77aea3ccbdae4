"""Request: what a user asked, as the engine core sees it; its status and how it ended. Standard library and numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from engine.params import SamplingParams
from engine.step import I32


class RequestStatus(IntEnum):
    """Legal moves: WAITING -> RUNNING -> WAITING (preempted) ...; any -> FINISHED, once."""

    WAITING = 0
    RUNNING = 1
    BLOCKED = 2  # waits for a remote load, a grammar or an adapter; holds nothing that others need
    FINISHED = 3


class FinishReason(IntEnum):
    """How a request ended; the names are what clients see. 0 on the wire means: not finished."""

    NONE = 0
    STOP = 1  # eos, a stop id or a stop string
    LENGTH = 2  # max_tokens or the model length
    ABORT = 3
    ERROR = 4

    @property
    def text(self) -> str | None:
        return None if self is FinishReason.NONE else self.name.lower()


@dataclass(slots=True, kw_only=True)
class Request:
    """One sequence to generate. A user's request with n > 1 becomes n of these that share a `parent` key.

    key: unique number given by our own front end, never by a client (R17).
    prompt: i32 [prompt_len].
    params: validated; `params.n` is ignored here.
    stop_ids: ids that end it: eos (unless ignore_eos) and stop_token_ids.
    eos_ids: the subset of stop_ids that is eos (finish reason text carries no stop_reason for these).
    bad_word_ids: token sequences of params.bad_words.
    seed: 64 bits, drawn at admission when the user gave none.
    domain: bytes hashed into every prefix key: tenant, salt, adapter, media, weights version.
    """

    key: int
    prompt: I32
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    priority: int = 0  # lower runs first, as in vLLM
    domain: bytes = b""
    parent: int | None = None
    arrival: int = 0  # monotonic sequence number given at admission
    status: RequestStatus = RequestStatus.WAITING
    outputs: list[int] = field(default_factory=list)  # only while preempted or finished; rows own them while running
    num_preemptions: int = 0

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    def all_tokens(self) -> I32:
        """Prompt and outputs, i32 [n]."""
        if not self.outputs:
            return self.prompt
        return np.concatenate([self.prompt, np.asarray(self.outputs, np.int32)])
