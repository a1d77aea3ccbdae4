"""A small engine core that answers messages, without scheduler or backend: it generates the prompt backwards, again
and again.

Run as a process by ProcessClient (`python -m tests.engine.core.echo_core`) or built in process. The first of
`config.model.served_model_name` picks a misbehaviour: "fail" (StartupError), "bug" (a stray exception), "exit" (dies
while starting), "slow" (takes a minute to start), "die at N" (dies at step N), "break at N" (raises at step N). A
prompt with token 13 is refused, one with token 14 meets a bug.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.config import EngineConfig
from engine.core.messages import (
    AbortRequests,
    AddRequest,
    CoreReady,
    FromCore,
    LogprobColumns,
    Ping,
    Reply,
    ResetPrefixCache,
    SchedulerStats,
    StepOutputs,
    ToCore,
)
from engine.core.process import run
from engine.errors import InvalidValue, StartupError
from engine.request import FinishReason
from engine.runner import Progress

VOCAB = 4096
STEP_S = 3e-4  # a very fast device


@dataclass(slots=True)
class Echo:
    request: AddRequest
    prompt: list[int]
    index: int  # of this sequence among the n
    made: list[int] = field(default_factory=list)

    def next(self) -> int:
        return self.prompt[-1 - (len(self.made) + self.index) % len(self.prompt)]


class EchoCore:
    def __init__(self, kind: str = "") -> None:
        self.kind = kind
        self.live: dict[int, Echo] = {}
        self.replies: list[FromCore] = []
        self.steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.live or self.replies)

    def handle(self, message: ToCore) -> None:
        match message:
            case AddRequest():
                prompt = np.frombuffer(message.prompt, "<i4").tolist()
                if 14 in prompt:
                    raise KeyError("a bug on admission")
                if 13 in prompt:
                    raise InvalidValue("prompt: token 13 is not accepted")
                for i in range(message.params.n):
                    self.live[message.key + i] = Echo(message, prompt, i)
            case AbortRequests():
                for key in message.keys:
                    self.live.pop(key, None)
            case Ping() | ResetPrefixCache():
                self.replies.append(Reply(message.call, True))

    def step(self) -> list[FromCore]:
        self.steps += 1
        if self.kind == f"die at {self.steps}":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == f"break at {self.steps}":
            raise RuntimeError("a broken invariant")
        out, self.replies = self.replies, []
        if self.live:
            time.sleep(STEP_S)
            out.append(self._outputs())
        return out

    def _outputs(self) -> StepOutputs:
        keys, tokens, finish, stop, cached, wants = list(self.live), [], [], [], [], 0
        for key in keys:
            echo = self.live[key]
            token = echo.next()
            echo.made.append(token)
            tokens.append(token)
            cached.append(0)
            params = echo.request.params
            stopped = token in echo.request.stop_ids and len(echo.made) > params.min_tokens
            stop.append(token if stopped else -1)
            reason = FinishReason.STOP if stopped else FinishReason.NONE
            if not stopped and len(echo.made) == params.max_tokens:
                reason = FinishReason.LENGTH
            finish.append(reason)
            wants = max(wants, -1 if params.logprobs is None else params.logprobs)
            if reason:
                del self.live[key]
        n = len(keys)
        columns = None
        if wants >= 1:
            top = np.tile(np.arange(wants, dtype="<i4"), (n, 1))
            columns = LogprobColumns(
                np.full(n, -1.5, "<f4").tobytes(),
                np.full(n, 7, "<i4").tobytes(),
                top.tobytes(),
                np.full((n, wants), -0.5, "<f4").tobytes(),
                wants,
            )
        return StepOutputs(
            keys=np.array(keys, "<i8").tobytes(),
            counts=np.ones(n, "<i4").tobytes(),
            tokens=np.array(tokens, "<i4").tobytes(),
            finish=np.array(finish, np.uint8).tobytes(),
            stop_token=np.array(stop, "<i4").tobytes(),
            num_cached=np.array(cached, "<i4").tobytes(),
            logprobs=columns,
            stats=SchedulerStats(len(self.live), 0, 0.0, 0, 0, 0, self.steps),
        )

    def shutdown(self) -> None:
        self.live.clear()


def build(config: EngineConfig, model_path: Path, progress: Progress) -> tuple[EchoCore, CoreReady]:
    kind = next(iter(config.model.served_model_name), "")
    if kind == "fail":
        raise StartupError("--dtype: no; use float32")
    if kind == "bug":
        raise KeyError("a bug\nwith two lines")
    if kind == "exit":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "slow":
        time.sleep(60)
    progress("weights", 1, 2)
    progress("weights", 2, 2)
    ready = CoreReady(
        max_model_len=config.model.max_model_len or 512,
        vocab_size=VOCAB,
        num_pages=100,
        page_tokens=16,
        kv_tokens=1600,
        max_logprobs=20,
        backend="echo",
        device="none",
        dtype="none",
        startup_s={"all": 0.0},
    )
    return EchoCore(kind), ready


if __name__ == "__main__":
    sys.exit(run(build))
