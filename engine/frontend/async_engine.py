"""AsyncEngine: add, stream, abort, over an engine core in its own process. What servers use.

One thread receives from the core and hands message batches to the event loop; everything else runs in the loop. A
request that nobody reads any more (cancelled, closed, aborted) is aborted in the core at once. When the core dies,
every waiting reader gets EngineDead. Keys inside are our own sequence numbers: a client's request id is only a label
(R17).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from engine.config import EngineConfig
from engine.core.client import CoreClient, OnProgress, ProcessClient
from engine.core.messages import AbortRequests, CoreReady, FromCore, Ping, Reply, ResetPrefixCache, SchedulerStats
from engine.errors import EngineDead, RequestError
from engine.frontend.input import InputProcessor, PreparedRequest, Prompt
from engine.frontend.model import OpenedModel, locate_model, open_model
from engine.frontend.output import OutputProcessor, RequestState
from engine.frontend.results import RequestOutput
from engine.frontend.texts import Texts
from engine.metrics.stats import FinishedRequest, IterationStats, StatsListener
from engine.params import RequestOutputKind, SamplingParams

log = logging.getLogger("twinfer.engine")

INLINE_CHARS = 2048  # shorter prompts are tokenised in the loop: a thread would cost more
TOKENIZER_THREADS = 2
MAX_BATCHES = 2  # of messages on their way to the loop: one is handled while the next one is read
RECEIVE_S = 0.25  # how late the receiving thread notices that it should stop


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderLimits:
    """When a reader of a DELTA stream is given up: more than this unread, for this long."""

    max_unread_bytes: int = 256 << 10
    slow_reader_s: float = 30.0


class RequestStream:
    """Outputs of one request; an async iterator. Leaving it, by any way, aborts what has not finished."""

    def __init__(self, engine: AsyncEngine, state: RequestState) -> None:
        self._engine = engine
        self._state = state
        self._news = asyncio.Event()
        self.unread_since: float | None = None  # over the limit since then

    @property
    def state(self) -> RequestState:
        return self._state

    def wake(self) -> None:
        self._news.set()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output: all that is new since the last one. Raises EngineDead, RequestError."""
        try:
            while True:
                output = self._state.take()
                if output is not None:
                    self.unread_since = None
                    return output
                if self._state.finished:
                    raise StopAsyncIteration
                self._news.clear()
                await self._news.wait()
        except BaseException:
            self._engine._leave(self)
            raise

    async def aclose(self) -> None:
        self._engine._leave(self)

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine._leave(self)


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
        self._limits = limits or ReaderLimits()
        self.listeners: list[StatsListener] = list(listeners)
        self._client: CoreClient = client or ProcessClient()
        self._pool = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="twinfer-text")
        self._streams: dict[int, RequestStream] = {}  # by first key
        self._by_id: dict[str, set[int]] = {}  # request id -> first keys
        self._calls: dict[int, asyncio.Future[bool]] = {}
        self._next_key = 0
        self._next_call = 0
        self._dead: str | None = "the engine is not started"
        self._stopping = threading.Event()
        self._room = threading.Semaphore(MAX_BATCHES)
        self._receiver: threading.Thread | None = None
        self._stats: SchedulerStats | None = None

    async def start(self, progress: OnProgress | None = None) -> CoreReady:
        """Start the core and read the tokenizer, side by side. `progress` is called from another thread."""
        self._loop = asyncio.get_running_loop()
        path = await asyncio.to_thread(locate_model, self.config)
        reading = asyncio.create_task(asyncio.to_thread(open_model, self.config, path))
        starting = asyncio.create_task(asyncio.to_thread(self._client.start, self.config, path, progress))
        try:
            self.model: OpenedModel = await reading
            self.ready: CoreReady = await starting
        except BaseException:
            self._client.close()
            await asyncio.gather(reading, starting, return_exceptions=True)
            raise
        self.inputs: InputProcessor = self.model.inputs(self.ready)
        self.texts = Texts(self.inputs)
        self._outputs = OutputProcessor(self.model.tokenizer)
        self._dead = None
        self._receiver = threading.Thread(target=self._receive, name="twinfer-receive", daemon=True)
        self._receiver.start()
        return self.ready

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        return self.ready.max_model_len

    @property
    def default_sampling(self) -> Mapping[str, Any]:
        """SamplingParams fields that the model's generation_config.json sets."""
        return self.model.defaults

    @property
    def is_running(self) -> bool:
        return self._dead is None

    is_alive = is_running

    @property
    def errored(self) -> bool:
        """The core died; closing on purpose is no error."""
        return self._dead is not None and not self._stopping.is_set()

    @property
    def num_unfinished(self) -> int:
        return len(self._streams)

    def stats(self) -> SchedulerStats | None:
        """The core's last figures."""
        return self._stats

    def check_health(self) -> None:
        """Raises EngineDead when the core has gone."""
        if self._dead is not None:
            raise EngineDead(self._dead)

    def get_default_sampling_params(self) -> SamplingParams:
        return self.model.default_sampling_params()

    # -- requests --------------------------------------------------------------------------------------------------

    async def prepare(self, prompt: Prompt, params: SamplingParams, **options: Any) -> PreparedRequest:
        """Tokenise and check. `options` are those of InputProcessor.prepare. Raises RequestError."""
        work = partial(self.inputs.prepare, prompt, params, **options)
        text = prompt if isinstance(prompt, str) else prompt.get("prompt") if isinstance(prompt, dict) else None
        if isinstance(text, str) and len(text) > INLINE_CHARS:
            return await self._loop.run_in_executor(self._pool, work)
        return work()

    async def add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: str = "",
    ) -> RequestStream:
        """Check a request and hand it to the core. Raises RequestError, EngineDead: nothing was begun then."""
        self.check_health()
        arrival = time.monotonic()
        request = await self.prepare(prompt, params, priority=priority, cache_salt=cache_salt, tenant=tenant)
        request.arrival = arrival
        return self.add_prepared(request, request_id)

    def add_prepared(self, request: PreparedRequest, request_id: str) -> RequestStream:
        """Hand a checked request to the core."""
        self.check_health()
        key = self._next_key
        self._next_key += request.params.n
        self._client.send(request.message(key))
        stream = RequestStream(self, self._outputs.add(request, request_id, key))
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
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one request, the last one `finished`. Closing or cancelling the iterator aborts the request."""
        stream = await self.add(prompt, params, request_id, priority=priority, cache_salt=cache_salt, tenant=tenant)
        async with stream:
            async for output in stream:
                yield output

    async def abort(self, request_id: str) -> None:
        """End every request of this id: its reader gets a last output with finish reason "abort". Idempotent."""
        for key in list(self._by_id.get(request_id, ())):
            stream = self._streams[key]
            self._abort_in_core(list(stream.state.keys))
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
            self._abort_in_core(list(state.keys))
            self._report(self._outputs.abort(state))
        self._outputs.forget(state)

    def _abort_in_core(self, keys: list[int]) -> None:
        if keys and self._dead is None:
            try:
                self._client.send(AbortRequests(keys))
            except EngineDead as error:
                self._on_dead(str(error))

    # -- calls -----------------------------------------------------------------------------------------------------

    async def reset_prefix_cache(self) -> bool:
        self._next_call += 1
        return await self._call(ResetPrefixCache(self._next_call))

    async def ping(self) -> bool:
        """A round trip through the core's loop."""
        self._next_call += 1
        return await self._call(Ping(self._next_call))

    async def _call(self, message: ResetPrefixCache | Ping) -> bool:
        self.check_health()
        future: asyncio.Future[bool] = self._loop.create_future()
        self._calls[message.call] = future
        try:
            self._client.send(message)
            return await future
        finally:
            del self._calls[message.call]

    # -- from the core ---------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """The receiving thread: batches of messages to the loop, until the core ends or we stop.

        A loop that is behind gets fewer, larger batches: what has come is read only when it is about to be handled.
        """
        try:
            while not self._stopping.is_set():
                if not self._room.acquire(timeout=RECEIVE_S):
                    continue
                messages = self._client.receive(RECEIVE_S)
                if messages:
                    self._loop.call_soon_threadsafe(self._on_messages, messages)
                else:
                    self._room.release()
        except EngineDead as error:
            if not self._stopping.is_set():
                self._loop.call_soon_threadsafe(self._on_dead, str(error))
        except RuntimeError:
            log.debug("the event loop closed before the engine")

    def _on_messages(self, messages: list[FromCore]) -> None:
        self._room.release()
        for message in messages:
            if isinstance(message, Reply):
                future = self._calls.get(message.call)
                if future is not None and not future.done():
                    future.set_result(message.ok)
                continue
            done = self._outputs.process(message)
            if done.aborts:
                self._abort_in_core(done.aborts)
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
        if state.kind is RequestOutputKind.DELTA and state.unread_bytes > self._limits.max_unread_bytes:
            now = time.monotonic()
            if stream.unread_since is None:
                stream.unread_since = now
            elif now - stream.unread_since > self._limits.slow_reader_s:
                self._abort_in_core(list(state.keys))
                error = RequestError("the answer was not read for too long; the request was ended")
                error.code = "slow_reader"
                self._report(self._outputs.fail(state, error))

    def _on_dead(self, reason: str) -> None:
        """The core has gone: everyone who waits is told, once."""
        if self._dead is not None:
            return
        self._dead = reason
        if not self._stopping.is_set():
            log.error("%s", reason)
        for stream in list(self._streams.values()):
            self._report(self._outputs.fail(stream.state, EngineDead(reason)))
            stream.wake()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDead(reason))

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
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._on_dead("the engine is shutting down")
        if self._receiver is not None:
            await asyncio.to_thread(self._receiver.join)
        await asyncio.to_thread(self._client.close)
        self._pool.shutdown(wait=False)

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()
