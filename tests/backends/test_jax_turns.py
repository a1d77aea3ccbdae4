"""The whole engine over the jax runner: the same requests give the same tokens, one turn a step, two or eight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.config import CacheConfig, EngineConfig, ModelConfig, ScheduleConfig
from engine.core.loop import CoreLoop
from engine.core.messages import AddRequest, StepOutputs
from engine.core.start import start_core
from engine.params import SamplingParams
from engine.request import FinishReason
from tests.checkpoints import write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)
SEEDED = SamplingParams(temperature=1.0, seed=11, max_tokens=37, top_p=0.95)
KINDS = (
    GREEDY,
    replace(GREEDY, logprobs=3, max_tokens=21),
    SEEDED,
    replace(SEEDED, seed=5, repetition_penalty=1.3, min_p=0.01, logit_bias={9: 2.0}, max_tokens=30),
    replace(SEEDED, seed=6, stop_token_ids=list(range(20, 60)), min_tokens=5),
)


def answers(folder: Path, most: int) -> tuple[list[tuple[list[int], int, list[float]]], int]:
    """((tokens, finish, log-probabilities) of each request, steps taken)."""
    config = EngineConfig(
        model=ModelConfig(dtype="float32", max_model_len=128),
        cache=CacheConfig(block_size=16, num_gpu_blocks_override=64),
        schedule=ScheduleConfig(max_num_seqs=4, max_num_batched_tokens=64, num_scheduler_steps=most),
        backend="jax",
        device="cpu",
    )
    loop, facts = start_core(config, folder, lambda phase, done, total: None)
    assert isinstance(loop, CoreLoop)
    found: dict[int, tuple[list[int], list[int], list[float]]] = {}
    rng = np.random.default_rng(4)
    for key in range(12):
        prompt = rng.integers(3, facts.vocab_size, int(rng.integers(1, 40)), dtype="<i4").tobytes()
        params = KINDS[key % len(KINDS)]
        found[key] = [], [], []
        stops = params.stop_token_ids
        loop.handle(AddRequest(key=key, prompt=prompt, params=params, stop_ids=stops, eos_ids=[], bad_word_ids=[]))
        if key % 3 == 2:  # now and then nothing waits
            take(loop, found)
    take(loop, found)
    steps = loop.scheduler.state.counters.steps
    loop.shutdown()
    return [(tokens, finish[-1], logprobs) for tokens, finish, logprobs in found.values()], steps


def take(loop: CoreLoop, found: dict[int, tuple[list[int], list[int], list[float]]]) -> None:
    """Run until nothing is left, and note what comes."""
    while loop.has_work:
        for message in loop.step():
            assert isinstance(message, StepOutputs), message
            tokens, at = np.frombuffer(message.tokens, "<i4").tolist(), 0
            keys, counts = np.frombuffer(message.keys, "<i8").tolist(), np.frombuffer(message.counts, "<i4").tolist()
            chosen = None if message.logprobs is None else np.frombuffer(message.logprobs.chosen, "<f4").tolist()
            for key, count, finish in zip(keys, counts, message.finish, strict=True):
                found[key][0].extend(tokens[at : at + count])
                found[key][1].append(finish)
                if chosen is not None and KINDS[key % len(KINDS)].logprobs is not None:
                    found[key][2].extend(chosen[at : at + count])
                at += count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mistral")
    write_checkpoint("mistral", path)  # with a window
    return path


def test_one_two_and_eight_turns(folder: Path) -> None:
    wanted, steps = answers(folder, 1)
    assert {finish for _, finish, _ in wanted} == {FinishReason.STOP, FinishReason.LENGTH}
    for most in (2, 8):
        got, fewer = answers(folder, most)
        for (tokens, finish, logprobs), (right, end, right_logprobs) in zip(got, wanted, strict=True):
            assert (tokens, finish) == (right, end)
            np.testing.assert_allclose(logprobs, right_logprobs, atol=1e-4)
        assert fewer < (0.7 if most == 2 else 0.4) * steps
