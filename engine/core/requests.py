"""Requests: how a message becomes sequences, and what a loop asks of whoever schedules them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import numpy as np

from engine.core.messages import AddRequest
from engine.errors import InvalidValue
from engine.request import Request
from engine.scheduler.stats import SchedulerGauges
from engine.scheduler.update import Failure

SEED_MASK = (1 << 64) - 1


class Requests(Protocol):
    """What a loop asks of its scheduler, or of the schedulers of all replicas together."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def abort(self, keys: Iterable[int]) -> int: ...

    def reset_prefix_cache(self) -> None: ...

    def commit_keys(self) -> None: ...

    def take_failures(self) -> list[Failure]: ...

    def stats(self) -> SchedulerGauges: ...


def sequences(message: AddRequest) -> list[Request]:
    """The n sequences of a request: keys key, key + 1, ...; seeds seed, seed + 1, ... Raises InvalidValue."""
    if len(message.prompt) % 4:
        raise InvalidValue(f"prompt: {len(message.prompt)} bytes are not whole 32-bit ids", param="prompt")
    prompt = np.frombuffer(message.prompt, "<i4").astype(np.int32, copy=False)
    params = message.params
    seed = secrets.randbits(64) if params.seed is None else params.seed & SEED_MASK
    first = Request(
        key=message.key,
        prompt=prompt,
        params=params,
        stop_ids=tuple(message.stop_ids),
        eos_ids=tuple(message.eos_ids),
        bad_word_ids=tuple(tuple(word) for word in message.bad_word_ids),
        seed=seed,
        priority=message.priority,
        domain=message.domain,
        parent=message.key if params.n > 1 else None,
    )
    if params.n == 1:
        return [first]
    # the prompt's logprobs are the same for all: the first sequence brings them
    others = replace(params, prompt_logprobs=None)
    return [first] + [
        replace(first, key=message.key + i, seed=(seed + i) & SEED_MASK, params=others, outputs=[])
        for i in range(1, params.n)
    ]
