"""The step for a TPU answers alike in every program: each bucket, pad, place in the batch, chunking, number of turns.

Stacked weights and a scan, with the plain kernel in many buckets and with the TPU's own, interpreted, in two. What a
request must answer is the numpy reference's argmax and log-probability, so that no program is judged by another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from backends.jax import stacks
from backends.jax.runner import Runner
from engine.runner import Progress, SamplerLimits
from engine.specs.checkpoint import read_config
from engine.specs.families import parse_config
from engine.step import Bucket
from pallas_kernels import dispatch
from tests.backends import driver
from tests.backends.driver import Driver, Seq
from tests.checkpoints import write_checkpoint
from tests.reference.decoder import decode, log_softmax, reference_params

LENGTH, OUTPUTS, SERVED = 21, 5, 64
LIMITS = SamplerLimits(max_logprobs=2, max_logit_bias=4, max_stop_ids=4, max_bad_words=2, max_bad_word_len=3)
BOUND = 1e-4
GREEDY, RANDOM = {"num_logprobs": 0}, {"temperature": 1.0, "seed": 7, "num_logprobs": 0}


class CheckpointRunner(Runner):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def load(self, checkpoint: Path | None, progress: Progress | None = None) -> None:
        super().load(self.folder, progress)


@dataclass(frozen=True, slots=True)
class Case:
    d: Driver
    prompt: list[int]
    tokens: list[int]  # greedy, by the reference
    logprobs: list[float]


@pytest.fixture(scope="module", params=["plain", "tpu_interpreted"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """gemma2: layers with and without a window, a cap on attention's logits."""
    folder = tmp_path_factory.mktemp("gemma2")
    write_checkpoint("gemma2", folder)
    arch = parse_config(read_config(folder))
    plain = request.param == "plain"
    buckets = {"token_buckets": (1, 3, 8, 32) if plain else (3, 16), "row_buckets": (3,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose_kernel", lambda platform, head_size: request.param)
        patch.setattr(stacks, "stacks_layers", lambda platform: True)
        patch.setattr(driver, "PAGE", 16 if plain else 128)
        d = Driver(
            CheckpointRunner(folder), arch, load_format="safetensors", max_slots=3, max_model_len=SERVED,
            sampler_limits=LIMITS, **buckets,
        )  # fmt: skip
        prompt = np.random.default_rng(2).integers(3, arch.vocab_size, LENGTH).tolist()
        _, params = reference_params(folder)
        tokens: list[int] = []
        for _ in range(OUTPUTS):
            tokens.append(int(decode(arch, params, np.array(prompt + tokens), SERVED)[-1].argmax()))
        logits = decode(arch, params, np.array(prompt + tokens[:-1]), SERVED)[LENGTH - 1 :]
        yield Case(d, prompt, tokens, log_softmax(logits)[np.arange(OUTPUTS), tokens].tolist())
        d.runner.shutdown()


def step(d: Driver, rows: list[tuple[Seq, int]], tokens: int, num_steps: int = 1) -> None:
    """One step in the bucket of so many tokens."""
    plan = d.plan(rows, num_steps=num_steps)
    d.collect(d.submit(replace(plan, bucket=Bucket(tokens=tokens, rows=plan.bucket.rows))))


def check(case: Case, seq: Seq, way: str) -> None:
    assert seq.outputs == case.tokens, way
    if seq.sampling.num_logprobs >= 0:
        np.testing.assert_allclose(seq.logprobs, case.logprobs, atol=BOUND, err_msg=way)
    case.d.close(seq)


def test_every_bucket_and_chunk(case: Case) -> None:
    """A prompt in chunks of every size in every bucket that holds them, then its decode steps there."""
    d = case.d
    for bucket in d.config.token_buckets:
        some = {1, bucket // 2} if len(d.config.token_buckets) > 2 else set()  # interpreted steps take their time
        for chunk in sorted({*some, bucket - 1, bucket} - {0}):
            seq = d.new(case.prompt, **GREEDY)
            while len(seq.outputs) < OUTPUTS:
                step(d, [(seq, min(seq.left, chunk))], bucket)
            check(case, seq, f"chunks of {chunk} in {bucket}")


def test_every_place_beside_strangers(case: Case) -> None:
    """First, in the middle and last, beside a stranger that decodes and one in prefill."""
    d = case.d
    largest = d.config.token_buckets[-1]
    for place in range(3):
        decoding, prefilling = d.new(d.prompt(9), **RANDOM), d.new(d.prompt(40))
        step(d, [(decoding, 9)], largest)
        seq = d.new(case.prompt, **GREEDY)
        while len(seq.outputs) < OUTPUTS:
            rows = [(decoding, 1), (prefilling, min(prefilling.left, 3))]
            rows.insert(place, (seq, min(seq.left, 8)))
            step(d, rows, largest)
        check(case, seq, f"place {place}")
        d.close(decoding)
        d.close(prefilling)


def test_every_number_of_turns(case: Case) -> None:
    """Decode steps of one to all turns, alone and beside rows that end before and after, in every bucket of theirs."""
    d = case.d
    largest = d.config.token_buckets[-1]
    for bucket in (size for size in d.config.token_buckets if size <= d.config.row_buckets[-1]):
        for turns in (2, OUTPUTS - 1):
            if bucket < d.config.row_buckets[-1]:
                seqs = [d.new(case.prompt)]  # without log-probabilities: the forward program samples
            else:
                seqs = [d.new(d.prompt(5), max_outputs=2, **RANDOM), d.new(case.prompt, **GREEDY), d.new(d.prompt(7))]
            for seq in seqs:
                while seq.left > 1 or not seq.outputs:
                    step(d, [(seq, min(seq.left, largest))], largest)
            mine = seqs[len(seqs) // 2]
            while len(mine.outputs) < OUTPUTS:
                live = [seq for seq in seqs if len(seq.outputs) < seq.sampling.max_outputs]
                step(d, [(seq, 1) for seq in live], bucket, turns)
            check(case, mine, f"{turns} turns in {bucket}")
            for seq in seqs:
                if seq is not mine:
                    d.close(seq)


def test_random_answers_too(case: Case) -> None:
    """A seed's tokens are those of the first bucket in all others, whatever the number of turns."""
    d = case.d
    found = []
    for bucket in d.config.token_buckets:
        seq = d.new(case.prompt, **RANDOM)
        while not seq.outputs:
            step(d, [(seq, min(seq.left, bucket))], bucket)
        if bucket <= d.config.row_buckets[-1]:
            step(d, [(seq, 1)], bucket, OUTPUTS - 1)
        while len(seq.outputs) < OUTPUTS:
            step(d, [(seq, 1)], bucket)
        found.append(seq.outputs)
        d.close(seq)
    assert all(outputs == found[0] for outputs in found)
