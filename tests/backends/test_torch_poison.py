"""A row whose numbers are NaN is told by name and leaves nothing to the next tenants of its pages."""

from __future__ import annotations

import pytest
import torch

from engine.step import RowError
from tests.backends.driver import Driver

runner_module = pytest.importorskip("backends.torch.runner", reason="the torch extra is not installed")
POISON = 7


def test_nan_stays_with_its_row() -> None:
    runner = runner_module.Runner()
    d = Driver(runner)
    with torch.inference_mode():
        table = runner._decoder.embed.clone()  # the output head, which may be the same tensor, stays whole
        table[POISON] = torch.nan
        runner._decoder.embed = table
    prompts = [[t for t in d.prompt(n) if t != POISON] for n in (20, 35, 50)]
    clean = [d.new(p, num_logprobs=0) for p in prompts]
    d.generate(clean, 3)
    for seq in clean:
        d.close(seq)
    d.free_pages = [pages[-9:] for pages in d.free_pages]  # the next ones take the same few pages
    bad = d.new([POISON] * 120)
    assert d.step([(bad, 20)]).error.tolist() == [RowError.NON_FINITE]  # a chunk that samples nothing
    assert d.step([(bad, 100)]).error.tolist() == [RowError.NON_FINITE]
    d.close(bad)
    after = [d.new(p, num_logprobs=0) for p in prompts]
    d.generate(after, 3)  # decoded together: the shorter rows are padded with what their pages still hold
    for seq, want in zip(after, clean, strict=True):
        assert seq.outputs == want.outputs and not any(seq.errors)
        assert seq.logprobs == pytest.approx(want.logprobs, abs=1e-5)
    runner.shutdown()
