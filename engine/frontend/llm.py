"""LLM: the offline face. Prompts in, RequestOutputs in the same order out; arguments and results shaped as vLLM's.

The core runs in this process unless told otherwise. Every prompt is checked before the first one runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

from engine.core.client import CoreClient, InProcessClient, OnProgress, ProcessClient
from engine.core.messages import AbortRequests, FromCore, Reply, ResetPrefixCache
from engine.errors import InvalidValue
from engine.frontend.chat import RenderOptions
from engine.frontend.input import PreparedRequest, Prompt
from engine.frontend.interrupt import DeferredInterrupt
from engine.frontend.model import locate_model, open_model
from engine.frontend.options import engine_config
from engine.frontend.output import OutputProcessor, RequestState
from engine.frontend.progress import GenerationBar, NoBar, StartupBar
from engine.frontend.results import CompletionOutput, RequestOutput
from engine.frontend.tokenizer import load_tokenizer
from engine.params import RequestOutputKind, SamplingParams

Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None
RECEIVE_S = 0.5


class LLM:
    """A model that answers lists of prompts.

    model: a folder, a hub name ORG/NAME, or "" for the model that ships with the package. Other keywords are the fields
    of EngineConfig's parts, by vLLM's names. Raises StartupError.
    """

    def __init__(
        self,
        model: str | Path = "",
        tokenizer: str | Path | None = None,
        *,
        own_process: bool = False,
        client: CoreClient | None = None,
        show_progress: bool = True,
        **options: Any,
    ) -> None:
        """own_process: run the core in a process of its own. show_progress: a bar while weights load."""
        chosen = {"model": str(model), "tokenizer": None if tokenizer is None else str(tokenizer), **options}
        self.config = engine_config(chosen)
        path = locate_model(self.config)
        self.model = open_model(self.config, path)
        self._client: CoreClient = client or (ProcessClient() if own_process else InProcessClient())
        with StartupBar(show_progress) as bar:
            on_progress: OnProgress = bar.update
            self.ready = self._client.start(self.config, path, on_progress)
        self.inputs = self.model.inputs(self.ready)
        self._outputs = OutputProcessor(self.model.tokenizer)
        self._next_key = 0
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt. Raises InvalidValue, NeverFits, Unsupported before anything runs."""
        listed = list_prompts(prompts)
        params = self._list_params(sampling_params, len(listed))
        ranks = list(priority) if priority is not None else [0] * len(listed)
        if len(ranks) != len(listed):
            raise InvalidValue(f"priority: {len(ranks)} values for {len(listed)} prompts", param="priority")
        prepared = [
            self.inputs.prepare(prompt, final_only(one), priority=rank)
            for prompt, one, rank in zip(listed, params, ranks, strict=True)
        ]
        return self._run(prepared, use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        **options: Unpack[RenderOptions],
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them. Raises as `generate`."""
        chats = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        params = self._list_params(sampling_params, len(chats))
        prepared = [
            self.inputs.prepare_chat(
                chat,  # type: ignore[arg-type]  # a list of conversations by now
                final_only(one),
                **options,
            )
            for chat, one in zip(chats, params, strict=True)
        ]
        return self._run(prepared, use_tqdm)

    def _list_params(self, given: Params, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        listed = list(given)
        if len(listed) != count:
            raise InvalidValue(f"sampling_params: {len(listed)} of them for {count} prompts", param="sampling_params")
        return listed

    def _run(self, prepared: list[PreparedRequest], use_tqdm: bool) -> list[RequestOutput]:
        """Run checked requests to their end, in input order. An interrupt aborts all of them."""
        states: list[RequestState] = []
        bar = GenerationBar(len(prepared)) if use_tqdm and prepared else NoBar()
        try:
            with bar, DeferredInterrupt() as interrupt:
                for request in prepared:
                    request.arrival = time.monotonic()
                    self._client.send(request.message(self._next_key))
                    states.append(self._outputs.add(request, str(self._num_requests), self._next_key))
                    self._next_key += request.params.n
                    self._num_requests += 1
                while self._outputs.requests:
                    self._on_messages(self._client.receive(RECEIVE_S), bar)
                    interrupt.check()
        except BaseException:
            self._abort(states)
            raise
        return [result(state) for state in states]

    def _on_messages(self, messages: list[FromCore], bar: GenerationBar | NoBar) -> None:
        for message in messages:
            done = self._outputs.process(message)
            if done.aborts:
                self._client.send(AbortRequests(done.aborts))
            iteration = done.iteration
            bar.update(len(iteration.finished), iteration.num_prompt, iteration.num_generated)

    def _abort(self, states: list[RequestState]) -> None:
        keys = [key for state in states for key in self._outputs.forget(state)]
        if keys:
            self._client.send(AbortRequests(keys))
            self._client.receive(0.0)  # lets a core in this process take note

    def get_tokenizer(self) -> Any:
        """A transformers tokenizer of your own: changing it does not disturb the engine."""
        if self.model.tokenizer is None:
            raise InvalidValue("tokenizer: there is none (skip_tokenizer_init)", param="tokenizer")
        return load_tokenizer(self.model.tokenizer.source).hf

    def get_default_sampling_params(self) -> SamplingParams:
        """From the model's generation_config.json."""
        return self.model.default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; running requests are not disturbed."""
        self._num_requests += 1
        call = self._num_requests
        self._client.send(ResetPrefixCache(call))
        while True:
            for message in self._client.receive(RECEIVE_S):
                if isinstance(message, Reply) and message.call == call:
                    return message.ok

    def shutdown(self) -> None:
        """Stop the core and free its memory. May be called twice."""
        self._client.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


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
