"""The last layer of a long step over its sampled tokens alone, against the same layer over every token.

In triton's interpreter, or on a GPU. Pages must hold the same keys and values, rows the same tokens and logprobs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.interpreter import DEVICE  # before triton

pytest.importorskip("triton")

from backends.torch.gpu import GpuSteps
from backends.torch.rehearsal import one_layer_of_each_kind
from backends.torch.runner import Runner
from cuda_kernels import quant_linear
from engine.specs.arch import ArchSpec
from engine.step import PromptLogprobs
from tests.backends.driver import Driver, llama
from tests.backends.last_layer import ARCHS, STEPS, check_same, served
from torch_models.fused import FusedDecoder


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens, sampled rows with their padding) of each step that cuts its last layer."""
    monkeypatch.setattr(GpuSteps, "least_tokens", 6)
    monkeypatch.setattr(GpuSteps, "make_mixed", lambda *_: None)  # graphs cut every step
    found = []
    plain: Callable[..., torch.Tensor] = FusedDecoder.finish

    def finish(self: FusedDecoder, x: torch.Tensor, *rest: object) -> torch.Tensor:
        found.append((len(x), len(rest[-1].tokens)))  # type: ignore[attr-defined]
        return plain(self, x, *rest)

    monkeypatch.setattr(FusedDecoder, "finish", finish)
    return found


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_as_the_whole_layer(arch: ArchSpec, finished: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    # Products of e4m3 by e4m3 keep 13 bits of what they add up, and round otherwise in tiles of another size; through
    # float16 they are exact. What they may be off is held by test_quant_linear.py.
    monkeypatch.setattr(quant_linear, "has_wide_fp8", lambda device: False)
    cut = served(arch, DEVICE.type)
    assert finished[-3:] == [(tokens, 4 if rows == 3 else rows) for tokens, rows in STEPS]
    count = len(finished)
    monkeypatch.setattr(GpuSteps, "least_tokens", None)
    check_same(cut, served(arch, DEVICE.type), slice(1, None))
    assert len(finished) == count


def test_what_takes_every_token(finished: list[tuple[int, int]]) -> None:
    """Scores of prompt tokens, short steps, steps that are sampled from everywhere, --batch-invariant."""
    driver = Driver(Runner(), seed=5, device=DEVICE.type, warm=False)
    seqs = [driver.new(driver.prompt(length)) for length in (20, 5, 3, 3, 3)]
    ids = np.arange(3, dtype=np.int32)
    driver.step([(seqs[0], 10)], prompt_logprobs=PromptLogprobs(token_idx=ids, targets=ids, num_top=0))
    driver.step([(seqs[1], 5)])
    two = [driver.new(driver.prompt(1)) for _ in range(3)]
    driver.step([*((seq, 1) for seq in two), (seqs[2], 3)])
    driver.step([(seqs[3], 3), (seqs[4], 3)])
    assert finished == [(6, 2)]
    served(llama(), DEVICE.type, batch_invariant=True)
    assert len(finished) == 1


def test_a_broken_row_is_flagged_alone(finished: list[tuple[int, int]]) -> None:
    """Whether it samples or not."""
    driver = Driver(Runner(), replace(llama(), tied_embeddings=False), seed=5, device=DEVICE.type, warm=False)
    driver.runner._decoder.embed[9] = float("inf")  # type: ignore[attr-defined]
    rows = [(driver.new([5, 6, 7, 8]), 4), (driver.new([5, 9, 7, 8]), 4), (driver.new([9, 6, 7, 8]), 3)]
    driver.step(rows)
    assert finished == [(11, 2)]
    assert [bool(seq.errors[0]) for seq, _ in rows] == [False, True, True]


def test_warm_up_runs_it(finished: list[tuple[int, int]]) -> None:
    """On a GPU kernels are compiled there, also from a model cut down to a layer of each kind."""
    driver = Driver(Runner(), ARCHS["window"], seed=5, device=DEVICE.type, warm=False, max_batched_tokens=20)
    steps = driver.runner._work  # type: ignore[attr-defined]
    with one_layer_of_each_kind(steps._fused, steps._loaded.places):
        steps._warm_others()
    assert (20, 1) in finished
    assert all(tokens >= 6 for tokens, _ in finished)
