"""Typed messages between front ends and the engine core: msgspec structs over ZeroMQ (or by hand, in one process).

Struct of arrays on the way out: one StepOutputs message a step, columns as raw little-endian bytes, so that neither
side touches an object per token. No pickle, no extension types.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from engine.params import SamplingParams

MAX_FRAME_BYTES = 1 << 28
"""Largest message either side accepts; a peer that sends more is cut off by the socket."""

Key = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Priority = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]


class AddRequest(msgspec.Struct, tag="add", array_like=True):
    """Begin a request. With params.n > 1 the core makes n sequences with keys key, key + 1, ... key + n - 1."""

    key: Key
    prompt: bytes  # i32 little endian
    params: SamplingParams
    stop_ids: list[int]
    eos_ids: list[int]
    bad_word_ids: list[list[int]]
    priority: Priority = 0
    domain: bytes = b""


class AbortRequests(msgspec.Struct, tag="abort", array_like=True):
    """Stop and forget; unknown and finished keys are ignored. No output follows for these keys."""

    keys: list[int]


class ResetPrefixCache(msgspec.Struct, tag="reset", array_like=True):
    call: int


class Ping(msgspec.Struct, tag="ping", array_like=True):
    call: int


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True):
    pass


ToCore = AddRequest | AbortRequests | ResetPrefixCache | Ping | Shutdown


class LogprobColumns(msgspec.Struct, array_like=True):
    """Logprobs of n tokens, k top entries each: raw little-endian columns."""

    chosen: bytes  # f32 [n]
    rank: bytes  # i32 [n]
    top_ids: bytes  # i32 [n, k], -1 pads
    top: bytes  # f32 [n, k]
    k: int


class SchedulerStats(msgspec.Struct, array_like=True):
    """Gauges, and counters since the core started."""

    num_running: int
    num_waiting: int
    kv_usage: float  # [0, 1]
    prefix_queries: int  # tokens looked up
    prefix_hits: int  # tokens found
    num_preemptions: int
    step: int  # steps run so far (heartbeat)


class StepOutputs(msgspec.Struct, tag="step", array_like=True):
    """What one step gave to the clients. Row i made counts[i] tokens; tokens holds them one after another."""

    keys: bytes  # i64 [R]
    counts: bytes  # i32 [R]
    tokens: bytes  # i32 [sum(counts)]
    finish: bytes  # u8 [R] FinishReason
    stop_token: bytes  # i32 [R] the id that ended it, -1 = none; only meaningful with FinishReason.STOP
    num_cached: bytes  # i32 [R] prompt tokens found in the prefix cache (known from the first output on), -1 = not yet
    logprobs: LogprobColumns | None = None  # n = sum(counts), present when any row wants logprobs
    prompt_logprobs: dict[int, LogprobColumns] | None = None  # key -> columns of prompt tokens 1 .. prompt_len - 1
    stats: SchedulerStats | None = None
    started: bytes = b""  # i64 keys that got a turn (again, if they were preempted) since the last message
    started_s: bytes = b""  # f64, one each: when, on the host's monotonic clock, which all processes share


class RequestFailed(msgspec.Struct, tag="failed", array_like=True):
    """One request ended in an error; nobody else is disturbed."""

    key: int
    code: str
    message: str


class Reply(msgspec.Struct, tag="reply", array_like=True):
    """Answer to a call (ResetPrefixCache, Ping)."""

    call: int
    ok: bool


class CoreReady(msgspec.Struct, tag="ready", array_like=True):
    """The core can take requests. Facts that front ends need."""

    max_model_len: int
    vocab_size: int
    num_pages: int
    page_tokens: int
    kv_tokens: int  # of all replicas
    max_logprobs: int
    backend: str
    device: str
    dtype: str
    startup_s: dict[str, float]  # phase -> seconds
    backend_reason: str = ""  # why this backend was chosen
    memory: dict[str, int] = {}  # bytes by purpose as planned, kv_cache and the allocator's peak; {} where not planned
    notes: list[str] = []  # lines worth telling the user
    num_compiles: int = 0  # programs or kernels compiled at this start, without those loaded from --executables


class CoreFailed(msgspec.Struct, tag="core_failed", array_like=True):
    """The core could not start, or is about to end: one line with cause and remedy."""

    message: str


class StartupProgress(msgspec.Struct, tag="progress", array_like=True):
    phase: str
    done: int
    total: int


FromCore = StepOutputs | RequestFailed | Reply | CoreReady | CoreFailed | StartupProgress
