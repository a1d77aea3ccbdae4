"""The jax and the torch runner on the same weights and the same plans: same tokens, logprobs within 1e-4."""

from __future__ import annotations

import numpy as np
import pytest

from engine.runner import load_runner
from engine.specs.arch import ArchSpec
from tests.backends.driver import Driver, llama

pytest.importorskip("torch", reason="the torch extra is not installed")


@pytest.mark.parametrize("arch", [llama(), llama(windows=(20, None))], ids=["full", "windowed"])
def test_same_plans_same_answers(arch: ArchSpec) -> None:
    answers = []
    for name in ("jax", "torch"):
        d = Driver(load_runner(name), arch, seed=5, token_buckets=(64,), row_buckets=(4,), max_slots=4)
        seqs = [
            d.new(d.prompt(50), num_logprobs=3),
            d.new(d.prompt(7), num_logprobs=3, temperature=1.0, seed=2**40 + 1, top_p=0.9, repetition=1.2),
            d.new(d.prompt(20), num_logprobs=3, temperature=0.7, top_k=20, min_p=0.05, bias={4: 2.0}, seed=8),
        ]
        d.generate(seqs, 12, chunk=20)
        answers.append([(s.outputs, s.logprobs) for s in seqs])
        d.runner.shutdown()
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(*answers, strict=True):
        assert tokens == other_tokens
        np.testing.assert_allclose(logprobs, other_logprobs, atol=1e-4)
