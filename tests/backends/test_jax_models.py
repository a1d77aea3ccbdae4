"""Every family and rope through the JAX runner equals the numpy reference: chunked prefill, strangers, then decoding.

Prompt log-probabilities are compared at every position, and greedy tokens one by one; sequences are longer than windows
and pages. bfloat16 is compared with float32 loosely: it must run, and be near.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.jax.runner import Runner
from engine.runner import Progress
from engine.specs.arch import ArchSpec
from engine.specs.checkpoint import read_config
from engine.specs.families import parse_config
from engine.step import PromptLogprobs
from pallas_kernels import cpu_attention, cpu_linear
from tests.backends.driver import Driver
from tests.checkpoints import FAMILIES, ROPES, write_checkpoint
from tests.reference.decoder import decode, log_softmax, reference_params

BOUND = 1e-4
LENGTH, OUTPUTS, SERVED = 60, 5, 96

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((family, family, {}) for family in FAMILIES),
    *((f"llama-{kind}", "llama", {"rope_parameters": rope}) for kind, rope in ROPES.items() if kind != "default"),
    ("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama-odd-head", "llama", {"head_dim": 24, "num_key_value_heads": 1}),
]


class CheckpointRunner(Runner):
    """A runner whose driver need not know the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def load(self, checkpoint: Path | None, progress: Progress | None = None) -> None:
        super().load(self.folder, progress)


def drive(folder: Path, dtype: str) -> tuple[ArchSpec, Driver]:
    arch = parse_config(read_config(folder))
    buckets = {"token_buckets": (2, 64), "row_buckets": (2,), "max_slots": 2, "max_model_len": SERVED}
    return arch, Driver(
        CheckpointRunner(folder), arch, load_format="safetensors", dtype=dtype, kv_dtype=dtype, **buckets
    )


def score(d: Driver, prompt: list[int]) -> tuple[list[float], list[int]]:
    """Log-probabilities of the prompt's ids after the first, and greedy outputs."""
    seq, stranger = d.new(prompt), d.new(d.prompt(20))
    scores: list[float] = []
    for n in (17, 1, 30, LENGTH - 48):
        first = seq.planned
        index = np.arange(n if first + n < len(prompt) else n - 1, dtype=np.int32)
        wanted = PromptLogprobs(token_idx=index, targets=np.array(prompt, np.int32)[first + 1 + index], num_top=0)
        rows = [(seq, n)] + ([(stranger, min(stranger.left, 9))] if n > 1 and stranger.left else [])
        result = d.step(rows, prompt_logprobs=wanted)
        assert result.prompt_logprobs is not None
        scores += result.prompt_logprobs.chosen.tolist()
    d.generate([seq], OUTPUTS)
    return scores, seq.outputs


@pytest.mark.parametrize(("family", "overrides"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_equals_reference(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(family, tmp_path, **overrides)
    arch, d = drive(tmp_path, "float32")
    prompt = np.random.default_rng(3).integers(3, arch.vocab_size, LENGTH).tolist()
    scores, outputs = score(d, prompt)
    _, params = reference_params(tmp_path)
    logits = decode(arch, params, np.array(prompt + outputs[:-1]), SERVED)
    wanted = log_softmax(logits)[np.arange(LENGTH - 1), prompt[1:]]
    np.testing.assert_allclose(scores, wanted, atol=BOUND)
    for index, token in enumerate(outputs):
        row = logits[LENGTH - 1 + index]
        assert row[token] >= row.max() - 1e-5
    d.runner.shutdown()


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_plain_kernels_equal_reference(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where there is no prebuilt library, and on every other device."""
    monkeypatch.setattr(cpu_attention, "available", lambda head_size: False)
    monkeypatch.setattr(cpu_linear, "available", lambda x, weight: False)
    test_equals_reference(family, {}, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_is_near(family: str, tmp_path: Path) -> None:
    write_checkpoint(family, tmp_path, initializer_range=0.05, dtype="bfloat16")
    arch, d = drive(tmp_path, "bfloat16")
    prompt = np.random.default_rng(3).integers(3, arch.vocab_size, LENGTH).tolist()
    scores, _ = score(d, prompt)
    _, params = reference_params(tmp_path)
    wanted = log_softmax(decode(arch, params, np.array(prompt), SERVED))[np.arange(LENGTH - 1), prompt[1:]]
    assert np.abs(np.array(scores) - wanted).mean() < 0.05
    d.runner.shutdown()
