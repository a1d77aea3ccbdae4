"""--batch-invariant through the whole engine: a request's tokens and logprobs, bit by bit, in every company.

In triton's interpreter, or on a GPU. The models are tiny, with what could break it: a window, a cap, sandwich norms,
query-key norms, several groups of layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.interpreter import DEVICE  # before triton

pytest.importorskip("triton")

from backends.torch.runner import Runner
from cuda_kernels.step_begin import DecodeStart
from engine.config import CacheConfig, EngineConfig, ModelConfig, ScheduleConfig
from engine.core.loop import CoreLoop
from engine.core.messages import AddRequest, StepOutputs
from engine.core.start import start_core
from engine.params import SamplingParams
from tests.backends.driver import Driver

COMMON = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": COMMON | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "gemma2": COMMON | {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 24,
        "query_pre_attn_scalar": 24, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}  # fmt: skip
OUTPUTS = 6
LENGTHS = (62, 46, 30)  # some pages short of what they come to


@dataclass(slots=True)
class Answer:
    tokens: list[int] = field(default_factory=list)
    scores: list[bytes] = field(default_factory=list)  # logprobs of each token and of the likeliest, as bits
    num_cached: int = 0


def start(
    folder: Path, *, tokens: int = 128, pages: int = 40, caching: bool = False, dtype: str = "float32"
) -> CoreLoop:
    config = EngineConfig(
        model=ModelConfig(load_format="dummy", dtype=dtype, max_model_len=128),
        cache=CacheConfig(block_size=16, num_gpu_blocks_override=pages, enable_prefix_caching=caching),
        schedule=ScheduleConfig(max_num_seqs=4, max_num_batched_tokens=tokens),
        backend="torch",
        device=DEVICE.type,
        batch_invariant=True,
    )
    return start_core(config, folder)[0]


def prompt(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(3, 320, LENGTHS[index]).astype("<i4")


def request(index: int) -> AddRequest:
    """The second one samples."""
    heat = {"temperature": 0.9, "seed": 7, "top_p": 0.9} if index == 1 else {"temperature": 0.0}
    params = SamplingParams(max_tokens=OUTPUTS, ignore_eos=True, logprobs=3, **heat)  # type: ignore[arg-type]
    return AddRequest(index, prompt(index).tobytes(), params, [], [], [])


def serve(loop: CoreLoop, indexes: Sequence[int]) -> list[Answer]:
    """All of them at once."""
    answers = {index: Answer() for index in indexes}
    for index in indexes:
        loop.handle(request(index))
    while loop.has_work:
        for message in loop.step():
            if isinstance(message, StepOutputs):
                take(message, answers)
    assert all(len(answer.tokens) == len(answer.scores) == OUTPUTS for answer in answers.values())
    return list(answers.values())


def take(message: StepOutputs, answers: dict[int, Answer]) -> None:
    tokens, columns = np.frombuffer(message.tokens, "<i4"), message.logprobs
    assert columns is not None
    chosen = np.frombuffer(columns.chosen, "<f4")
    top = np.frombuffer(columns.top, "<f4").reshape(len(chosen), -1)
    at = 0
    for key, count, cached in zip(
        np.frombuffer(message.keys, "<i8"),
        np.frombuffer(message.counts, "<i4"),
        np.frombuffer(message.num_cached, "<i4"),
    ):
        answer = answers[int(key)]
        answer.num_cached = int(cached)
        for i in range(at, at + int(count)):
            answer.tokens.append(int(tokens[i]))
            answer.scores.append(chosen[i].tobytes() + top[i].tobytes())
        at += int(count)


def same(got: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    for mine, other in zip(got, wanted, strict=True):
        assert mine.tokens == other.tokens
        assert mine.scores == other.scores


@pytest.mark.parametrize("name", MODELS)
def test_in_every_company(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    dtype = "bfloat16" if name == "qwen3" else "float32"
    loop = start(tmp_path, caching=True, dtype=dtype)
    alone = [serve(loop, [index])[0] for index in range(len(LENGTHS))]
    again = serve(loop, [0])
    assert alone[0].num_cached == 0 and again[0].num_cached > 0
    same(again, alone[:1])  # hit from the cache
    loop.shutdown()
    loop = start(tmp_path, dtype=dtype)
    same(serve(loop, range(len(LENGTHS))), alone)  # together
    loop.shutdown()
    loop = start(tmp_path, tokens=40, pages={"qwen3": 9, "gemma2": 15}[name], dtype=dtype)
    same(serve(loop, range(len(LENGTHS))), alone)  # in chunks, and preempted
    assert loop.scheduler.stats().num_preemptions
    loop.shutdown()


def test_a_rehearsed_step_reads_positions_that_nothing_wrote() -> None:
    """compile_ahead.rehearsal launches no kernel of ours, but torch's own indexing runs."""
    driver = Driver(Runner(), batch_invariant=True, warm=False, device=DEVICE.type)
    graphs = driver.runner._work._graphs
    wild = torch.tensor([-5, 1 << 30, 7], dtype=torch.int32, device=DEVICE)
    begun = DecodeStart(ids=wild, bad=wild, positions=wild, lengths=wild, turns=(), x=wild)
    (work,) = graphs.works(begun, torch.zeros(3, dtype=torch.int32, device=DEVICE))
    assert work.write_at.shape == (3,)
