"""BatchRunner: a list of checked requests to their ends, over any core client, in the caller's thread. LLM's engine.

And what turns the lists that users give into one prompt, one SamplingParams and one priority a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from engine.core.client import CoreClient
from engine.core.messages import AbortRequests, FromCore, Reply, ResetPrefixCache
from engine.errors import InvalidValue
from engine.frontend.input import PreparedRequest, Prompt
from engine.frontend.interrupt import DeferredInterrupt
from engine.frontend.output import OutputProcessor, RequestState
from engine.frontend.progress import GenerationBar, NoBar
from engine.frontend.results import CompletionOutput, RequestOutput
from engine.params import RequestOutputKind, SamplingParams

Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None
RECEIVE_S = 0.5


class BatchRunner:
    """Keys of requests are our own sequence numbers."""

    def __init__(self, client: CoreClient, outputs: OutputProcessor) -> None:
        self._client = client
        self.outputs = outputs
        self._next_key = 0
        self._num_requests = 0
        self._num_calls = 0

    def run(self, prepared: list[PreparedRequest], use_tqdm: bool) -> list[RequestOutput]:
        """Run checked requests to their end, in input order. An interrupt aborts all of them."""
        states: list[RequestState] = []
        bar = GenerationBar(len(prepared)) if use_tqdm and prepared else NoBar()
        try:
            with bar, DeferredInterrupt() as interrupt:
                for request in prepared:
                    request.arrival = time.monotonic()
                    self._client.send(request.message(self._next_key))
                    states.append(self.outputs.add(request, str(self._num_requests), self._next_key))
                    self._next_key += request.params.n
                    self._num_requests += 1
                while self.outputs.requests:
                    self._on_messages(self._client.receive(RECEIVE_S), bar)
                    interrupt.check()
        except BaseException:
            self._abort(states)
            raise
        return [result(state) for state in states]

    def _on_messages(self, messages: list[FromCore], bar: GenerationBar | NoBar) -> None:
        for message in messages:
            done = self.outputs.process(message)
            if done.aborts:
                self._client.send(AbortRequests(done.aborts))
            iteration = done.iteration
            bar.update(len(iteration.finished), iteration.num_prompt, iteration.num_generated)

    def _abort(self, states: list[RequestState]) -> None:
        keys = [key for state in states for key in self.outputs.forget(state)]
        if keys:
            self._client.send(AbortRequests(keys))
            self._client.receive(0.0)  # lets a core in this process take note

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. Nothing may be running."""
        self._num_calls += 1
        self._client.send(ResetPrefixCache(self._num_calls))
        while True:
            for message in self._client.receive(RECEIVE_S):
                if isinstance(message, Reply) and message.call == self._num_calls:
                    return message.ok


def list_params(given: Params, default: Callable[[], SamplingParams], count: int) -> list[SamplingParams]:
    """One for each prompt. Raises InvalidValue."""
    if given is None:
        given = default()
    if isinstance(given, SamplingParams):
        return [given] * count
    listed = list(given)
    if len(listed) != count:
        raise InvalidValue(f"sampling_params: {len(listed)} of them for {count} prompts", param="sampling_params")
    return listed


def list_priorities(given: Sequence[int] | None, count: int) -> list[int]:
    """One for each prompt. Raises InvalidValue."""
    ranks = [0] * count if given is None else list(given)
    if len(ranks) != count:
        raise InvalidValue(f"priority: {len(ranks)} values for {count} prompts", param="priority")
    return ranks


def list_prompts(prompts: Prompts) -> list[Prompt]:
    """One prompt or several: a string, a mapping or a list of ids is one."""
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def final_only(params: SamplingParams) -> SamplingParams:
    return replace(params, output_kind=RequestOutputKind.FINAL_ONLY)


def result(state: RequestState) -> RequestOutput:
    """The finished output; a request that failed in the core answers with finish reason "error"."""
    if state.error is None:
        output = state.take()
        if output is not None:
            return output
    failed = CompletionOutput(0, "", [], finish_reason="error", stop_reason=str(state.error))
    request = state.request
    return RequestOutput(
        state.request_id, request.prompt, request.prompt_token_ids, None, [failed], finished=True, metrics=state.times
    )
