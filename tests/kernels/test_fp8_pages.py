"""KV pages of e4m3 through the fused runner: as a cache of f32 whose entries are rounded to e4m3 when they are written.

In triton's interpreter, or on a GPU. Steps are prompts, chunks of prompts beside decoding rows, and decode steps.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import DEVICE  # before triton

pytest.importorskip("triton")

from backends.torch.device import has_fp8_pages
from backends.torch.eager import EagerSteps
from backends.torch.invariant import InvariantSteps
from backends.torch.runner import Runner
from backends.torch.step import Loaded
from cuda_kernels.gpu_attention import HeadSpec
from cuda_kernels.invariant_attention import attention
from cuda_kernels.rope_cache import rope_and_write
from tests.backends.driver import Driver, Seq, llama
from torch_models.invariant import InvariantDecoder, InvariantWork

pytestmark = pytest.mark.skipif(not has_fp8_pages(DEVICE), reason="this GPU does not know e4m3")
LENGTHS = (37, 20, 5)


class RoundedDecoder(InvariantDecoder):
    """What has been written is rounded before anything reads it."""

    def attend(
        self,
        qkv: Tensor,
        turn: tuple[Tensor | None, Tensor | None],
        cache: Tensor,
        layer: int,
        work: InvariantWork,
        heads: HeadSpec,
    ) -> Tensor:
        q = rope_and_write(qkv, cache, layer, work.write_at, *turn, num_heads=heads.num_heads)
        page = cache.shape[4]
        pages = cache[layer].transpose(2, 3)  # [2, P, page, K, H]
        at = (slice(None), work.write_at // page, work.write_at % page)
        pages[at] = pages[at].clamp(-448, 448).to(torch.float8_e4m3fn).float()
        out = attention(
            q, cache, layer, work.page_table, work.slots, work.query_starts, work.lengths,
            tiles=work.tiles[2], scratch=work.scratch, scale=heads.scale, window=heads.window,
        )  # fmt: skip
        return out.view(out.shape[0], -1)


class RoundedSteps(InvariantSteps):
    def make_decoder(self, loaded: Loaded) -> InvariantDecoder:
        return RoundedDecoder(loaded.decoder)


class RoundedRunner(Runner):
    def _room(self, loaded: Loaded, fused: bool) -> EagerSteps:
        return RoundedSteps(loaded)


def served(runner: Runner, **config: object) -> list[Seq]:
    """Three sequences, in chunks, then five tokens of each, all forced to the same ids."""
    driver = Driver(runner, llama(windows=(20, None)), seed=5, device=DEVICE.type, **config)
    seqs = [driver.new(driver.prompt(length), num_logprobs=0) for length in LENGTHS]
    driver.step([(seqs[0], 30), (seqs[2], 5)])
    driver.step([(seqs[0], 7), (seqs[2], 1), (seqs[1], 20)])
    for _ in range(4):
        driver.step([(seq, 1) for seq in seqs])
    for seq in seqs:
        driver.close(seq)
    runner.shutdown()
    return seqs


def test_as_a_cache_that_is_rounded_when_it_is_written() -> None:
    """The batch-invariant kernels read every key from its page: the same to the bit. The others keep close."""
    rounded = served(RoundedRunner(), batch_invariant=True)
    invariant = served(Runner(), batch_invariant=True, kv_dtype="fp8_e4m3")
    fused = served(Runner(), kv_dtype="fp8_e4m3")
    plain = served(Runner())
    moved = 0.0
    for want, same, close, other in zip(rounded, invariant, fused, plain, strict=True):
        assert want.outputs == same.outputs == close.outputs
        assert want.logprobs == same.logprobs
        np.testing.assert_allclose(close.logprobs, want.logprobs, atol=2e-4)
        if other.outputs == want.outputs:
            moved = max(moved, float(np.abs(np.array(other.logprobs) - want.logprobs).max()))
    assert moved > 1e-3  # eight bits are felt, or nothing was tested
