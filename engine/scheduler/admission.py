"""What a request must satisfy before it may wait for its turn: everything that could hurt a step is refused here.

The front doors validate too; this is the engine's own word (R2, R3): every id that will reach the device lies in
[0, V), every list fits its device table, and the request can run to its first token in the pages there are (S-7).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.errors import InvalidValue, NeverFits
from engine.params import validate
from engine.request import Request
from engine.scheduler.config import SchedulerConfig

PRIORITY_LIMIT = 2**53  # what JSON carries exactly


def admit_check(request: Request, config: SchedulerConfig, capacity: int) -> None:
    """Raise InvalidValue or NeverFits. capacity: tokens that one sequence alone can hold in the pools."""
    validate(request.params)
    check_prompt(request, config, capacity)
    check_ids("stop_token_ids", request.stop_ids, config)
    check_length("stop_token_ids", len(request.stop_ids), config.max_stop_ids)
    check_bad_words(request, config)
    params = request.params
    if params.logit_bias:
        check_ids("logit_bias", params.logit_bias, config)
        check_length("logit_bias", len(params.logit_bias), config.max_logit_bias)
    if params.allowed_token_ids:
        check_ids("allowed_token_ids", params.allowed_token_ids, config)
    check_logprobs("logprobs", params.logprobs, config)
    check_logprobs("prompt_logprobs", params.prompt_logprobs, config)
    if not 0 <= request.seed < 2**64:
        raise InvalidValue(f"seed: {request.seed} is not accepted; expected 64 bits", param="seed")
    if not -PRIORITY_LIMIT <= request.priority <= PRIORITY_LIMIT:
        raise InvalidValue(f"priority: {request.priority} is not accepted; expected -2^53 .. 2^53", param="priority")


def check_prompt(request: Request, config: SchedulerConfig, capacity: int) -> None:
    prompt = request.prompt
    if not len(prompt):
        raise InvalidValue("prompt: it is empty; expected at least one token", param="prompt")
    if prompt.dtype != np.int32 or prompt.ndim != 1:
        raise InvalidValue(f"prompt: {prompt.dtype} {prompt.shape} is not accepted; expected i32 [n]", param="prompt")
    low, high = int(np.minimum.reduce(prompt)), int(np.maximum.reduce(prompt))
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise InvalidValue(f"prompt: token id {bad} is not in [0, {config.vocab_size})", param="prompt")
    least = max(1, request.params.min_tokens)
    if len(prompt) + least > config.max_model_len:
        raise NeverFits(
            f"prompt: {len(prompt)} tokens and at least {least} to generate do not fit the model length "
            f"{config.max_model_len}",
            param="prompt",
        )
    if len(prompt) + least > capacity:
        raise NeverFits(
            f"prompt: {len(prompt)} tokens and at least {least} to generate do not fit the KV cache, "
            f"which holds {capacity} tokens of one request",
            param="prompt",
        )


def check_ids(name: str, ids: Iterable[int], config: SchedulerConfig) -> None:
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise InvalidValue(f"{name}: token id {token} is not in [0, {config.vocab_size})", param=name)


def check_length(name: str, length: int, limit: int) -> None:
    if length > limit:
        raise InvalidValue(f"{name}: {length} entries are not accepted; expected at most {limit}", param=name)


def check_bad_words(request: Request, config: SchedulerConfig) -> None:
    words = request.bad_word_ids
    check_length("bad_words", len(words), config.max_bad_words)
    for word in words:
        if not 0 < len(word) <= config.max_bad_word_len:
            raise InvalidValue(
                f"bad_words: a word of {len(word)} tokens is not accepted; expected 1 .. {config.max_bad_word_len}",
                param="bad_words",
            )
        check_ids("bad_words", word, config)


def check_logprobs(name: str, wanted: int | None, config: SchedulerConfig) -> None:
    """-1 asks for the whole vocabulary."""
    if wanted is not None and num_logprobs(wanted, config) > config.max_logprobs:
        shown = "-1 (all)" if wanted == -1 else str(wanted)
        raise InvalidValue(f"{name}: {shown} is not accepted; expected at most {config.max_logprobs}", param=name)


def num_logprobs(wanted: int | None, config: SchedulerConfig) -> int:
    """Top entries to ask the device for: -1 = none."""
    if wanted is None:
        return -1
    return config.vocab_size if wanted == -1 else min(wanted, config.vocab_size)
