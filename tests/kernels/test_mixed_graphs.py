"""Steps with prompt tokens through the bodies of their graphs, against the same steps launched one by one.

In triton's interpreter, or captured on a GPU. Rows must hold the same tokens and logprobs, pages the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.interpreter import DEVICE  # before triton

pytest.importorskip("triton")

from backends.torch import mixed_inputs
from backends.torch.gpu import GpuSteps
from backends.torch.mixed_graphs import MixedGraphs
from backends.torch.mixed_inputs import mixed_sizes
from backends.torch.rehearsal import one_layer_of_each_kind
from backends.torch.runner import Runner
from engine.specs.arch import ArchSpec
from engine.step import PromptLogprobs, RowError
from tests.backends.driver import Driver, Seq, llama
from tests.backends.last_layer import ARCHS, check_same, served
from torch_models import fused

Served = tuple[list[Seq], list[torch.Tensor]]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the steps that a graph took."""
    monkeypatch.setattr(GpuSteps, "least_tokens", 2)  # steps that no graph takes cut their last layer, too
    found: list[int] = []
    plain = MixedGraphs.forward

    def forward(self: MixedGraphs, size: int, inputs: torch.Tensor) -> None:
        found.append(size)
        plain(self, size, inputs)

    monkeypatch.setattr(MixedGraphs, "forward", forward)
    return found


@pytest.fixture
def both(replayed: list[int], monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Served]], None]:
    """Compares what a function serves with graphs and without."""

    def compare(run: Callable[[], Served]) -> None:
        ours, count = run(), len(replayed)
        assert count
        with monkeypatch.context() as patch:
            patch.setattr(GpuSteps, "make_mixed", lambda *_: None)
            check_same(ours, run(), slice(1, None))
        assert len(replayed) == count

    return compare


def driver_of(arch: ArchSpec | None = None, **config: object) -> Driver:
    return Driver(Runner(), arch or llama(), seed=5, device=DEVICE.type, **{"max_batched_tokens": 48, **config})


def results(driver: Driver, seqs: list[Seq]) -> Served:
    caches = [cache.clone() for cache in driver.runner._work._loaded.caches]  # type: ignore[attr-defined]
    driver.runner.shutdown()
    return seqs, caches


def test_sizes() -> None:
    assert mixed_sizes(40) == [16, 32, 40]
    assert mixed_sizes(1 << 14)[-3:] == [768, 896, 1024]


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_as_without(arch: ArchSpec, both: Callable[..., None], replayed: list[int]) -> None:
    """Lone prompts, chunks, decode rows beside prompts; windows, norms, few bits."""
    both(lambda: served(arch, DEVICE.type, max_batched_tokens=48))
    assert replayed == [32, 32, 48]


def test_edges(both: Callable[..., None], replayed: list[int]) -> None:
    """Steps that fill a size, one token more, one token alone."""

    def run() -> Served:
        driver = driver_of()
        seqs = [driver.new(driver.prompt(length), num_logprobs=0) for length in (16, 17, 34, 49)]
        driver.step([(seqs[0], 16)])
        driver.step([(seqs[1], 17)])
        driver.step([(seqs[2], 32)])
        driver.step([(seqs[2], 1)])
        driver.step([(seqs[3], 48)])
        driver.step([(seqs[3], 1), *((seq, 1) for seq in seqs[:3])])
        return results(driver, seqs)

    both(run)
    assert replayed == [16, 32, 32, 16, 48]


def test_in_flight(both: Callable[..., None]) -> None:
    """Tokens that the host has not seen, and a second step told before the first is done."""

    def run() -> Served:
        driver = driver_of()
        seqs = [driver.new(driver.prompt(length), num_logprobs=0) for length in (9, 30)]
        driver.step([(seqs[0], 9)])
        plans = [[(seqs[0], 1), (seqs[1], 12)], [(seqs[0], 1), (seqs[1], 18)]]
        handles = [driver.submit(driver.plan(rows)) for rows in plans]
        for handle in handles:
            driver.collect(handle)
        driver.step([(seq, 1) for seq in seqs])
        return results(driver, seqs)

    both(run)


def test_shared_pages(both: Callable[..., None]) -> None:
    """A prompt that begins where another's pages end, its last page copied."""

    def run() -> Served:
        driver = driver_of()
        first = driver.new(driver.prompt(30), num_logprobs=0)
        driver.step([(first, 30)])
        second = driver.new(first.tokens[:30] + driver.prompt(6), num_logprobs=0)
        copies = driver.share(second, first, 24)
        driver.step([(second, len(second.tokens) - 24), (first, 1)], copies=copies)
        driver.step([(first, 1), (second, 1)])
        return results(driver, [first, second])

    both(run)


def test_what_no_graph_takes(replayed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of prompt tokens, too many tokens, tiles or rows of one token, --batch-invariant."""
    monkeypatch.setattr(mixed_inputs, "MOST_SINGLES", 2)
    monkeypatch.setattr(mixed_inputs, "PARTIAL_TILES", 1)
    monkeypatch.setattr(mixed_inputs, "SIZES", (16, 32))
    driver = driver_of()
    ids = np.arange(3, dtype=np.int32)
    seq, long = driver.new(driver.prompt(12)), driver.new(driver.prompt(40))
    driver.step([(seq, 10)], prompt_logprobs=PromptLogprobs(token_idx=ids, targets=ids, num_top=0))
    driver.step([(long, 40)])
    few = [driver.new(driver.prompt(2)) for _ in range(3)]
    driver.step([(seq, 2) for seq in few])  # three tiles, with room for two
    driver.step([*((seq, 1) for seq in few), (seq, 2)])
    assert not replayed
    driver.step([(few[0], 1), (few[1], 1), (driver.new(driver.prompt(3)), 3)])
    assert replayed == [16]
    driver.runner.shutdown()
    served(llama(), DEVICE.type, batch_invariant=True)
    assert replayed == [16]


def test_warm_up_runs_every_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands last in a model cut down to a layer of each kind: on a GPU kernels are compiled there."""
    driver = driver_of(ARCHS["window"], warm=False)
    mixed = driver.runner._work._mixed  # type: ignore[attr-defined]
    found = []
    plain = fused.attend
    monkeypatch.setattr(fused, "attend", lambda *args: found.append(args[-1].window) or plain(*args))
    with one_layer_of_each_kind(mixed._fused, mixed._loaded.places), torch.inference_mode():
        mixed.rehearse()
    assert found == [20, None] * len(mixed.sizes)


def test_errors_are_of_their_rows(replayed: list[int]) -> None:
    """Ids outside the vocabulary, states that are not finite; sampled or not."""
    driver = driver_of(replace(llama(), tied_embeddings=False))
    driver.runner._decoder.embed[9] = float("inf")  # type: ignore[attr-defined]
    prompts = ([5, 6, 7, 8], [5, 500, 7, 8], [5, 9, 7, 8], [9, 6, 7, 8], [6, 7, 8])
    seqs = [driver.new(prompt) for prompt in prompts]
    result = driver.step(list(zip(seqs, (4, 4, 4, 3, 3), strict=True)))
    assert replayed == [32]
    assert result.error.tolist() == [0, RowError.BAD_TOKEN_ID, RowError.NON_FINITE, RowError.NON_FINITE, 0]
