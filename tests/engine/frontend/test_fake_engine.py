"""The front end over the real scheduler and the fake runner: streams, seeds, deaths, freed pages, failed starts."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import CacheConfig, EngineConfig, ModelConfig, ScheduleConfig
from engine.core.client import ProcessClient
from engine.core.messages import AbortRequests, AddRequest, Ping, Reply, StepOutputs
from engine.errors import EngineDead, StartupError
from engine.frontend.async_engine import AsyncEngine
from engine.frontend.llm import LLM
from engine.params import RequestOutputKind, SamplingParams
from tests.engine.frontend.checkpoints import make_folder

VOCAB = 384  # ids of the tiny tokenizer, bytes among them: answers are full of broken and whole characters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("fake") / "model", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, backend="fake", load_format="dummy", max_num_seqs=8, max_num_batched_tokens=64) as llm:
        yield llm


def config(folder: Path, **model: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(folder), load_format="dummy", **model),
        cache=CacheConfig(num_gpu_blocks_override=200),
        schedule=ScheduleConfig(max_num_seqs=8, max_num_batched_tokens=64),
        backend="fake",
    )


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(config(folder)) as engine:
        yield engine


def test_both_homes_of_the_core_give_the_same_answers(llm: LLM, folder: Path) -> None:
    prompts = ["The fox", "def mean(", [5] * 100, "naïve café"]
    params = SamplingParams(max_tokens=20, n=2, seed=7, temperature=0.8, top_k=50, logprobs=3, prompt_logprobs=2)
    here = llm.generate(prompts, params)  # type: ignore[arg-type]
    with LLM(folder, own_process=True, backend="fake", load_format="dummy", max_num_seqs=8) as other:
        there = other.generate(prompts, params)  # type: ignore[arg-type]
    assert [r.outputs for r in here] == [r.outputs for r in there]
    assert [r.prompt_logprobs for r in here] == [r.prompt_logprobs for r in there]
    for result in here:
        assert len(result.prompt_logprobs or ()) == len(result.prompt_token_ids)
        for output in result.outputs:
            assert len(output.logprobs or ()) == len(output.token_ids)
            assert all(3 <= len(at) <= 4 for at in output.logprobs or ())


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[tuple[asyncio.AbstractEventLoop, AsyncEngine]]:
    """An engine and its event loop for all examples of a property."""
    loop, engine = asyncio.new_event_loop(), AsyncEngine(config(folder))
    loop.run_until_complete(engine.start())
    yield loop, engine
    loop.run_until_complete(engine.shutdown())
    loop.close()


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.lists(st.integers(5, VOCAB - 20), min_size=1, max_size=40),
    stops=st.lists(st.text(alphabet="aet\u00e9 .", min_size=1, max_size=2), max_size=3),
    seed=st.integers(0, 5),
    include=st.booleans(),
)
def test_streamed_text_is_whole_text(
    shared: tuple[asyncio.AbstractEventLoop, AsyncEngine], prompt: list[int], stops: list[str], seed: int, include: bool
) -> None:
    loop, engine = shared

    def params(kind: RequestOutputKind) -> SamplingParams:
        return SamplingParams(
            max_tokens=60, seed=seed, stop=stops, output_kind=kind, include_stop_str_in_output=include, logprobs=0
        )

    async def read(kind: RequestOutputKind, pause: bool) -> tuple[str, Any, Any, list[int], int]:
        text, ids, num_logprobs, last = "", [], 0, None
        async for output in engine.generate(prompt, params(kind), f"{kind}{pause}"):
            last = output.outputs[0]
            joined = kind is RequestOutputKind.DELTA
            text, ids = (text + last.text, ids + last.token_ids) if joined else (last.text, last.token_ids)
            num_logprobs = len(last.logprobs or ()) + (num_logprobs if joined else 0)
            if pause:
                await asyncio.sleep(0.003)
        assert last is not None
        return text, last.finish_reason, last.stop_reason, ids, num_logprobs

    async def run() -> None:
        answers = await asyncio.gather(*(read(k, p) for k in RequestOutputKind for p in (False, True)))
        assert all(answer == answers[0] for answer in answers), answers
        text, reason, stop, ids, num_logprobs = answers[0]
        assert num_logprobs == len(ids)
        if reason == "length":
            assert engine.model.tokenizer is not None
            assert text == engine.model.tokenizer.decode(ids, skip_special_tokens=True)
        if isinstance(stop, str):
            assert text.endswith(stop) if include else stop not in text

    loop.run_until_complete(run())


async def test_who_leaves_frees_the_pages(engine: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=400, ignore_eos=True, n=2)
    tasks = [asyncio.create_task(drain(engine, params, f"r{i}")) for i in range(6)]
    while (stats := engine.stats()) is None or stats.num_running < 4:
        await asyncio.sleep(0.01)
    assert stats.kv_usage > 0
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert engine.num_unfinished == 0
    deadline = time.monotonic() + 2
    while (stats := engine.stats()) is None or stats.num_running + stats.num_waiting > 0 or stats.kv_usage > 0:
        assert time.monotonic() < deadline, stats
        await asyncio.sleep(0.01)


async def drain(engine: AsyncEngine, params: SamplingParams, request_id: str) -> str:
    try:
        async for _ in engine.generate("The quick brown fox", params, request_id):
            pass
    except EngineDead:
        return "dead"
    return "ended"


async def test_kill_reaches_everyone(folder: Path) -> None:
    async with AsyncEngine(config(folder)) as engine:
        params = SamplingParams(max_tokens=450, ignore_eos=True)
        tasks = [asyncio.create_task(drain(engine, params, f"r{i}")) for i in range(20)]  # some still wait
        while engine.stats() is None:
            await asyncio.sleep(0.01)
        assert isinstance(engine._link.client, ProcessClient)
        pid = engine._link.client.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        ends = await asyncio.gather(*tasks)
        assert time.monotonic() - begun < 2
        assert set(ends) == {"dead"}
    assert not psutil.pid_exists(pid)


async def test_failed_start_is_one_line_and_leaves_nothing(folder: Path) -> None:
    engine = AsyncEngine(config(folder, max_model_len=10**6))
    with pytest.raises(StartupError, match="--max-model-len") as raised:
        await engine.start()
    assert "\n" not in str(raised.value)
    assert isinstance(engine._link.client, ProcessClient)
    assert engine._link.client.pid is not None
    assert not psutil.pid_exists(engine._link.client.pid)


def test_stop_ids_min_tokens_and_bad_words(llm: LLM) -> None:
    base = llm.generate("The fox", SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))[0].outputs[0]
    stop = base.token_ids[4]
    first = base.token_ids.index(stop)
    ended = llm.generate(
        "The fox", SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    )[0].outputs[0]
    assert ended.token_ids == base.token_ids[: first + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    later = llm.generate(
        "The fox",
        SamplingParams(max_tokens=30, min_tokens=10, temperature=0, ignore_eos=True, stop_token_ids=[stop]),
    )[0].outputs[0]
    assert len(later.token_ids) > 10
    assert stop not in later.token_ids[:10]
    allowed = llm.generate("x", SamplingParams(max_tokens=9, allowed_token_ids=[40, 41], ignore_eos=True))[0]
    assert set(allowed.outputs[0].token_ids) <= {40, 41}


def test_times_of_a_request(llm: LLM) -> None:
    times = llm.generate("The fox", SamplingParams(max_tokens=5, ignore_eos=True))[0].metrics
    assert times is not None
    assert times.first_scheduled_time is not None
    assert times.first_token_time is not None
    assert times.finished_time is not None
    assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time
    assert times.num_generation_tokens == 5


def test_prefix_hits_are_told(llm: LLM) -> None:
    prompt = [7, 8, 9, 10] * 20
    llm.reset_prefix_cache()
    cold, warm = (llm.generate([prompt], SamplingParams(max_tokens=1))[0] for _ in range(2))
    assert cold.num_cached_tokens == 0
    assert (warm.num_cached_tokens or 0) >= 64
    salted = llm.generate([{"prompt_token_ids": prompt, "cache_salt": "s"}], SamplingParams(max_tokens=1))[0]
    assert salted.num_cached_tokens == 0


def test_a_core_survives_frames_that_nobody_should_send(folder: Path) -> None:
    """Bit flips, cuts and noise on the socket into the core (R5): it lives, and the next request is answered."""
    client = ProcessClient()
    client.start(config(folder), folder)
    noise = random.Random(5)
    params = SamplingParams(max_tokens=3, n=2, stop_token_ids=[7], logit_bias={5: 1.0}, bad_words=["x"])
    good = msgspec.msgpack.encode(AddRequest(1, np.arange(5, 25, dtype="<i4").tobytes(), params, [2, 7], [2], [[9]]))
    for i in range(3000):
        frame = bytearray(good)
        for _ in range(noise.randint(1, 6)):
            frame[noise.randrange(len(frame))] = noise.randrange(256)
        cut = noise.randrange(len(frame))
        client._outbox.send([bytes(frame), bytes(frame[:cut]), noise.randbytes(cut)][i % 3])
        if i % 100 == 0:
            client.receive(0.0)
    client.send(AbortRequests(list(range(2**16))))
    client.send(AddRequest(10**6, np.arange(5, 25, dtype="<i4").tobytes(), SamplingParams(), [], [], []))
    client.send(Ping(77))
    deadline = time.monotonic() + 20
    answered, tokens = False, 0
    while not (answered and tokens):
        assert time.monotonic() < deadline
        for message in client.receive(1.0):
            answered |= message == Reply(77, True)
            if isinstance(message, StepOutputs):
                tokens += np.frombuffer(message.keys, "<i8").tolist().count(10**6)
    client.close()
