"""AsyncEngine over a core in its own process: streams, aborts, slow readers, death, shutdown, listeners."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from engine.config import EngineConfig, ModelConfig
from engine.core.client import ProcessClient
from engine.errors import EngineDead, InvalidValue, NeverFits, RequestError, StartupError
from engine.frontend.async_engine import AsyncEngine, ReaderLimits
from engine.metrics.stats import IterationStats, SchedulerGauges
from engine.params import RequestOutputKind, SamplingParams

ECHO = "tests.engine.core.echo_core"
DELTA = RequestOutputKind.DELTA


class Listener:
    def __init__(self) -> None:
        self.iterations: list[IterationStats] = []
        self.running = -1

    def on_step(self, iteration: IterationStats, scheduler: SchedulerGauges | None) -> None:
        self.iterations.append(iteration)
        if scheduler is not None:
            self.running = scheduler.num_running

    @property
    def reasons(self) -> list[str]:
        return [f.reason for i in self.iterations for f in i.finished]


def make(folder: Path, limits: ReaderLimits | None = None, kind: str = "") -> AsyncEngine:
    model = ModelConfig(model=str(folder), max_model_len=100_000, served_model_name=(kind,))
    return AsyncEngine(EngineConfig(model=model), client=ProcessClient(ECHO), listeners=[Listener()], limits=limits)


@pytest.fixture
async def engine(folders: dict[str, Path]) -> AsyncIterator[AsyncEngine]:
    async with make(folders["byte_level"]) as engine:
        yield engine
        assert engine.num_unfinished == 0
        assert engine._outputs.requests == {}
        assert engine._outputs._by_key == {}
        assert engine._by_id == {}


def endless(**given: object) -> SamplingParams:
    return SamplingParams(max_tokens=90_000, ignore_eos=True, **given)  # type: ignore[arg-type]


def pid_of(engine: AsyncEngine) -> int:
    assert isinstance(engine._link.client, ProcessClient)
    assert engine._link.client.pid is not None
    return engine._link.client.pid


async def until_idle(engine: AsyncEngine, timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        await engine.ping()
        # a request makes the core report; what was aborted is gone by then
        async for _ in engine.generate([5], SamplingParams(max_tokens=1), "probe"):
            pass
        stats = engine.stats()
        assert stats is not None
        if stats.num_running == 0:
            return
        assert time.monotonic() < deadline


async def test_streams_equal_whole_answers(engine: AsyncEngine) -> None:
    async def text(kind: RequestOutputKind, i: int) -> str:
        params = SamplingParams(max_tokens=40, output_kind=kind, ignore_eos=True, stop=["zzz"])
        parts = [o async for o in engine.generate("naïve café 👋🏽 你好", params, f"{kind}{i}")]
        assert parts[-1].finished
        texts = [o.outputs[0].text for o in parts]
        return "".join(texts) if kind is DELTA else texts[-1]

    texts = await asyncio.gather(*(text(kind, i) for kind in RequestOutputKind for i in range(4)))
    assert len(set(texts)) == 1
    assert texts[0]


async def test_bad_requests_raise_before_the_core_sees_them(engine: AsyncEngine) -> None:
    for prompt, error in (([5000], InvalidValue), ([5] * 100_000, NeverFits)):
        with pytest.raises(error):
            async for _ in engine.generate(prompt, SamplingParams(), "x"):
                pass
    with pytest.raises(InvalidValue, match="13"):  # the core refuses this one
        async for _ in engine.generate([13], SamplingParams(), "x"):
            pass


@pytest.mark.parametrize("way", ["close", "cancel", "abort", "leave"])
async def test_who_leaves_frees_the_core(engine: AsyncEngine, way: str) -> None:
    if way == "close":
        async with aclosing(engine.generate([5, 6], endless(n=2), "a")) as outputs:  # type: ignore[type-var]
            async for _ in outputs:
                break
    elif way == "cancel":

        async def read() -> None:
            async for _ in engine.generate([5, 6], endless(), "a"):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif way == "abort":
        last = None
        async for output in engine.generate([5, 6], endless(), "a"):
            await engine.abort("a")
            await engine.abort("a")
            last = output
        assert last is not None
        assert last.finished
        assert last.outputs[0].finish_reason == "abort"
    else:
        async with await engine.add([5, 6], endless(), "a"):
            pass
    await until_idle(engine)
    listener = engine.listeners[0]
    assert isinstance(listener, Listener)
    assert listener.reasons.count("abort") == 1


async def test_abort_of_unknown_ids_is_nothing(engine: AsyncEngine) -> None:
    await engine.abort("never seen")
    await engine.abort_all()


async def test_equal_ids_of_different_clients_do_not_mix(engine: AsyncEngine) -> None:
    async def tokens(prompt: list[int]) -> list[int]:
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        return [o.outputs[0].token_ids async for o in engine.generate(prompt, params, "same")][-1]

    assert await asyncio.gather(tokens([5, 6]), tokens([7, 8])) == [[6, 5, 6], [8, 7, 8]]


async def test_a_slow_reader_gets_few_large_deltas(engine: AsyncEngine) -> None:
    stream = await engine.add([5, 6], SamplingParams(max_tokens=500, output_kind=DELTA, ignore_eos=True), "slow")
    await asyncio.sleep(1.0)
    outputs = [o async for o in stream]
    assert len(outputs) == 1
    assert len(outputs[0].outputs[0].token_ids) == 500


async def test_a_reader_that_never_reads_is_given_up(folders: dict[str, Path]) -> None:
    limits = ReaderLimits(max_unread_bytes=1000, slow_reader_s=0.1)
    async with make(folders["byte_level"], limits) as engine:
        stream = await engine.add([5, 6], endless(output_kind=DELTA), "stuck")
        await asyncio.sleep(0.6)
        with pytest.raises(RequestError) as raised:
            await anext(stream)
        assert raised.value.code == "slow_reader"
        await until_idle(engine)


async def test_kill_of_the_core_reaches_every_waiting_stream(folders: dict[str, Path]) -> None:
    engine = make(folders["byte_level"])
    await engine.start()

    async def read(i: int) -> str:
        try:
            async for _ in engine.generate([5, 6], endless(), f"r{i}"):
                pass
        except EngineDead as error:
            return str(error)
        return "ended"

    tasks = [asyncio.create_task(read(i)) for i in range(20)]
    waiting_call = asyncio.create_task(engine.ping())
    await asyncio.sleep(0.2)
    pid = pid_of(engine)
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    texts = await asyncio.gather(*tasks)
    assert time.monotonic() - begun < 2.0
    assert set(texts) == {"the engine core process ended: killed by SIGKILL; often out of memory"}
    assert await waiting_call
    assert engine.errored
    assert not engine.is_running
    with pytest.raises(EngineDead):
        await engine.add([5], SamplingParams(), "late")
    with pytest.raises(EngineDead):
        engine.check_health()
    assert engine.num_unfinished == 0
    await engine.shutdown()
    assert not psutil.pid_exists(pid)


async def test_shutdown_ends_streams_and_process(folders: dict[str, Path]) -> None:
    engine = make(folders["byte_level"])
    await engine.start()
    pid = pid_of(engine)
    stream = await engine.add([5, 6], endless(), "a")
    await anext(stream)
    await engine.shutdown()
    await engine.shutdown()
    with pytest.raises(EngineDead, match="shutting down"):
        await anext(stream)
    assert not psutil.pid_exists(pid)
    assert not engine.errored, "closing on purpose is no error"


async def test_failed_start_is_one_line(folders: dict[str, Path]) -> None:
    for kind, text in (("fail", "--dtype: no; use float32"), ("exit", "SIGKILL")):
        engine = make(folders["byte_level"], kind=kind)
        with pytest.raises(StartupError, match=text) as raised:
            await engine.start()
        assert "\n" not in str(raised.value)
        await engine.shutdown()


async def test_a_start_can_be_cancelled(folders: dict[str, Path]) -> None:
    engine = make(folders["byte_level"], kind="slow")
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0.7)
    pid = pid_of(engine)
    begun = time.monotonic()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert time.monotonic() - begun < 5
    assert not psutil.pid_exists(pid)


async def test_listeners_hear_of_every_token_and_end(engine: AsyncEngine) -> None:
    async for _ in engine.generate([5, 6, 7], SamplingParams(max_tokens=10, ignore_eos=True), "a"):
        pass
    listener = engine.listeners[0]
    assert isinstance(listener, Listener)
    assert sum(i.num_generated for i in listener.iterations) == 10
    assert sum(i.num_prompt for i in listener.iterations) == 3
    assert listener.reasons == ["length"]
    assert listener.running == 0


async def test_texts(engine: AsyncEngine) -> None:
    ids = engine.texts.encode("café", False)
    assert engine.texts.decode(ids) == "café"
    assert b"".join(engine.texts.token_bytes(ids)) == "café".encode()
    assert len(engine.texts.token_strings(ids)) == len(ids)
    assert await engine.reset_prefix_cache()
    with pytest.raises(InvalidValue):
        engine.texts.decode([5000])
    long = "The quick brown fox " * 1000
    async with await engine.add(long, SamplingParams(), "long") as stream:
        assert stream.state.request.prompt_token_ids == engine.texts.encode(long)
