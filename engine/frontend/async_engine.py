"""AsyncEngine: add, stream, abort, over an engine core in its own process. What servers use.

A request that nobody reads any more (cancelled, closed, aborted) is aborted in the core at once. When the core dies,
every waiting reader gets EngineDead. Keys inside are our own sequence numbers: a client's request id is only a label
(R17).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

from engine.config import EngineConfig
from engine.core.client import CoreClient, OnProgress, ProcessClient
from engine.core.messages import CoreReady, FromCore, SchedulerStats
from engine.errors import EngineDead, RequestError
from engine.frontend.input import PreparedRequest, Prompt
from engine.frontend.link import CoreLink
from engine.frontend.model import OpenedModel, locate_model, open_model
from engine.frontend.output import OutputProcessor, RequestState
from engine.frontend.results import RequestOutput
from engine.frontend.stream import ReaderLimits, RequestStream
from engine.metrics.stats import FinishedRequest, IterationStats, StatsListener
from engine.params import SamplingParams

INLINE_CHARS = 2048  # shorter prompts are tokenised in the loop: a thread would cost more


class AsyncEngine:
    """Not thread-safe: all methods are called from the event loop that ran `start`."""

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        client: CoreClient | None = None,
        listeners: Sequence[StatsListener] = (),
        limits: ReaderLimits | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.listeners: list[StatsListener] = list(listeners)
        self._limits = limits or ReaderLimits()
        self._link = CoreLink(client or ProcessClient(), self._on_message, self._on_dead)
        self._streams: dict[int, RequestStream] = {}  # by first key
        self._by_id: dict[str, set[int]] = {}  # request id -> first keys
        self._next_key = 0
        self._stats: SchedulerStats | None = None

    async def start(self, progress: OnProgress | None = None) -> CoreReady:
        """Start the core and read the tokenizer, side by side. `progress` is called from another thread.

        Raises StartupError in one line; nothing is left running then.
        """
        path = await asyncio.to_thread(locate_model, self.config)
        reading = asyncio.create_task(asyncio.to_thread(open_model, self.config, path))
        try:
            self.ready: CoreReady = await self._link.start(self.config, path, progress)
            self.model: OpenedModel = await reading
        except BaseException:
            reading.cancel()  # what it may raise is beside the point
            await self.shutdown()
            raise
        self.inputs, self.texts = self.model.text_side(self.ready)
        self._outputs = OutputProcessor(self.model.tokenizer)
        return self.ready

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        return self.ready.max_model_len

    @property
    def default_sampling(self) -> Mapping[str, int | float]:
        """SamplingParams fields that the model's generation_config.json sets."""
        return self.model.defaults

    @property
    def is_running(self) -> bool:
        return self._link.dead is None

    is_alive = is_running

    @property
    def errored(self) -> bool:
        """The core died; closing on purpose is no error."""
        return self._link.dead is not None and not self._link.stopping.is_set()

    @property
    def num_unfinished(self) -> int:
        return len(self._streams)

    def stats(self) -> SchedulerStats | None:
        """The core's last figures."""
        return self._stats

    def check_health(self) -> None:
        """Raises EngineDead when the core has gone."""
        self._link.check()

    def get_default_sampling_params(self) -> SamplingParams:
        return self.model.default_sampling_params()

    async def ping(self) -> bool:
        """A round trip through the core's loop."""
        return await self._link.ping()

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; running requests are not disturbed."""
        return await self._link.reset_prefix_cache()

    # -- requests --------------------------------------------------------------------------------------------------

    async def add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: str = "",
    ) -> RequestStream:
        """Check a request and hand it to the core. Raises RequestError, EngineDead: nothing was begun then."""
        self.check_health()

        def prepare() -> PreparedRequest:
            return self.inputs.prepare(prompt, params, priority=priority, tenant=tenant, cache_salt=cache_salt)

        text = prompt if isinstance(prompt, str) else prompt.get("prompt") if isinstance(prompt, dict) else None
        is_long = isinstance(text, str) and len(text) > INLINE_CHARS
        return self.add_prepared(await asyncio.to_thread(prepare) if is_long else prepare(), request_id)

    def add_prepared(self, request: PreparedRequest, request_id: str) -> RequestStream:
        """Hand a checked request to the core. Raises EngineDead."""
        key = self._next_key
        self._next_key += request.params.n
        self._link.send(request.message(key))
        stream = RequestStream(self._outputs.add(request, request_id, key), self._leave)
        self._streams[key] = stream
        self._by_id.setdefault(request_id, set()).add(key)
        return stream

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request, the last one `finished`. Closing or cancelling the iterator aborts the request."""
        async with await self.add(prompt, params, request_id, priority, cache_salt, tenant) as stream:
            async for output in stream:
                yield output

    async def abort(self, request_id: str) -> None:
        """End every request of this id: its reader gets a last output with finish reason "abort". Idempotent."""
        for key in list(self._by_id.get(request_id, ())):
            stream = self._streams[key]
            self._link.abort(list(stream.state.keys))
            self._report(self._outputs.abort(stream.state))
            stream.wake()

    async def abort_all(self) -> None:
        for request_id in list(self._by_id):
            await self.abort(request_id)

    def _leave(self, stream: RequestStream) -> None:
        """Its reader is gone or has everything. Idempotent."""
        state = stream.state
        if self._streams.pop(state.key, None) is None:
            return
        keys = self._by_id[state.request_id]
        keys.discard(state.key)
        if not keys:
            del self._by_id[state.request_id]
        if not state.finished and state.error is None:
            self._link.abort(list(state.keys))
            self._report(self._outputs.abort(state))
        self._outputs.forget(state)

    # -- from the core ---------------------------------------------------------------------------------------------

    def _on_message(self, message: FromCore) -> None:
        done = self._outputs.process(message)
        self._link.abort(done.aborts)
        if done.stats is not None:
            self._stats = done.stats
        self._tell(done.iteration, done.stats)
        for state in done.touched:
            self._wake(state)

    def _wake(self, state: RequestState) -> None:
        stream = self._streams.get(state.key)
        if stream is None:
            return
        stream.wake()
        if stream.is_too_slow(self._limits):
            self._link.abort(list(state.keys))
            error = RequestError("the answer was not read for too long; the request was ended")
            error.code = "slow_reader"
            self._report(self._outputs.fail(state, error))

    def _on_dead(self, reason: str) -> None:
        for stream in list(self._streams.values()):
            self._report(self._outputs.fail(stream.state, EngineDead(reason)))
            stream.wake()

    def _report(self, finished: FinishedRequest | None) -> None:
        """A request that ended without a message of the core."""
        if finished is not None:
            self._tell(IterationStats(finished=[finished]), None)

    def _tell(self, iteration: IterationStats, stats: SchedulerStats | None) -> None:
        for listener in self.listeners:
            listener.on_step(iteration, stats)

    # -- the end ---------------------------------------------------------------------------------------------------

    async def shutdown(self) -> None:
        """Stop the core. Readers that still wait get EngineDead. May be called twice."""
        await self._link.close()

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()
