"""The engine requests behind one HTTP request: started together, read as one stream, aborted when nobody reads on."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from engine.entrypoints.engine_client import Output, ServingEngine
from engine.entrypoints.openai.requests import GenerationRequest


async def generate(
    engine: ServingEngine, request: GenerationRequest, prompts: Sequence[list[int]]
) -> AsyncGenerator[tuple[int, Output], None]:
    """(prompt index, output) of every prompt, as they come. Closing it aborts what has not finished.

    The engine's ids are random and never the client's (R17).
    """
    ids = [uuid.uuid4().hex for _ in prompts]
    open_ids = set(ids)
    streams = [
        engine.generate(prompt, request.params, ids[i], request.priority, request.cache_salt)
        for i, prompt in enumerate(prompts)
    ]
    merged = merge(streams)
    try:
        async for i, output in merged:
            if output.finished:
                open_ids.discard(ids[i])
            yield i, output
    finally:
        await merged.aclose()
        for request_id in open_ids:
            await engine.abort(request_id)


async def merge(streams: Sequence[AsyncIterator[Output]]) -> AsyncGenerator[tuple[int, Output], None]:
    """(index, item) of all streams in order of arrival. The first error ends them all."""
    if len(streams) == 1:
        async for item in streams[0]:
            yield 0, item
        return
    arrived: asyncio.Queue[tuple[int, Output | None, Exception | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Output]) -> None:
        try:
            async for item in stream:
                arrived.put_nowait((index, item, None))
        except Exception as error:
            arrived.put_nowait((index, None, error))
        else:
            arrived.put_nowait((index, None, None))

    tasks = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            index, arrival, error = await arrived.get()
            if error is not None:
                raise error
            if arrival is None:
                running -= 1
            else:
                yield index, arrival
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
