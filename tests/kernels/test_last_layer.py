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

from backends.torch import gpu
from backends.torch.gpu import GpuSteps
from backends.torch.runner import Runner
from engine.specs.arch import ArchSpec
from engine.specs.families.fields import Fields
from engine.specs.families.quantization import parse_quantization
from engine.step import PromptLogprobs
from tests.backends.driver import Driver, Seq, llama
from torch_models.fused import FusedDecoder


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens, sampled rows with their padding) of each step that cuts its last layer."""
    monkeypatch.setattr(gpu, "LEAST_TOKENS", 6)
    found = []
    plain: Callable[..., torch.Tensor] = FusedDecoder.finish

    def finish(self: FusedDecoder, x: torch.Tensor, *rest: object) -> torch.Tensor:
        found.append((len(x), len(rest[-1].tokens)))  # type: ignore[attr-defined]
        return plain(self, x, *rest)

    monkeypatch.setattr(FusedDecoder, "finish", finish)
    return found


def normed() -> ArchSpec:
    """Query-key and sandwich norms, biases; the last layer has a window."""
    spec = llama(windows=(None, 20))
    layers = tuple(
        replace(
            layer,
            mixer=replace(layer.mixer, qk_norm=True, qkv_bias=True, out_bias=True),
            norms=replace(layer.norms, sandwich=True, offset=1.0),
        )
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


def served(arch: ArchSpec, **config: object) -> tuple[list[Seq], list[torch.Tensor]]:
    """Three sequences whose chunks stand beside decoding rows, then four tokens of each; and the pages."""
    driver = Driver(Runner(), arch, seed=5, device=DEVICE.type, **config)
    seqs = [driver.new(driver.prompt(length), num_logprobs=0) for length in (40, 30, 9)]
    driver.step([(seqs[0], 25)])  # nobody samples
    driver.step([(seqs[0], 8), (seqs[2], 9)])
    driver.step([(seqs[2], 1), (seqs[0], 7), (seqs[1], 30)])
    for _ in range(3):
        driver.step([(seq, 1) for seq in seqs])
    caches = [cache.clone() for cache in driver.runner._work._loaded.caches]  # type: ignore[attr-defined]
    driver.runner.shutdown()
    return seqs, caches


def quantised(**config: object) -> ArchSpec:
    quant = parse_quantization(Fields({"quantization_config": config}))
    return replace(llama(), tied_embeddings=False, quant=quant)


ARCHS = {
    "plain": llama(),
    "window": llama(windows=(20, None)),
    "normed": normed(),
    "gptq": quantised(quant_method="gptq", bits=4, group_size=32, desc_act=True),
    "blocks": quantised(quant_method="fp8", weight_block_size=[128, 128]),
}


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_as_the_whole_layer(arch: ArchSpec, finished: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    cut, pages = served(arch)
    assert finished[-3:] == [(25, 0), (17, 1), (38, 4)]
    count = len(finished)
    monkeypatch.setattr(GpuSteps, "cuts_last_layer", False)
    whole, whole_pages = served(arch)
    assert len(finished) == count
    for ours, theirs in zip(cut, whole, strict=True):
        assert ours.outputs == theirs.outputs
        assert ours.errors == theirs.errors
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
    for ours_too, theirs_too in zip(pages, whole_pages, strict=True):
        torch.testing.assert_close(ours_too[:, :, 1:], theirs_too[:, :, 1:], atol=2e-5, rtol=1e-4)  # page 0: padding's
        assert ours_too[:, :, 1:].abs().amax(dim=(1, 2, 3, 4, 5)).min() > 0  # every layer has written


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
    served(llama(), batch_invariant=True)
    assert len(finished) == 1


def test_a_broken_row_is_flagged_alone(finished: list[tuple[int, int]]) -> None:
    """Whether it samples or not."""
    driver = Driver(Runner(), replace(llama(), tied_embeddings=False), seed=5, device=DEVICE.type, warm=False)
    driver.runner._decoder.embed[9] = float("inf")  # type: ignore[attr-defined]
    rows = [(driver.new([5, 6, 7, 8]), 4), (driver.new([5, 9, 7, 8]), 4), (driver.new([9, 6, 7, 8]), 3)]
    driver.step(rows)
    assert finished == [(11, 2)]
    assert [bool(seq.errors[0]) for seq, _ in rows] == [False, True, True]
