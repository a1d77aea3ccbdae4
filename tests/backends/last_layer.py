"""Steps whose last layer takes the sampled tokens alone: shared by tests/backends and tests/kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from backends.torch.runner import Runner
from engine.specs.arch import ArchSpec
from engine.specs.families.fields import Fields
from engine.specs.families.quantization import parse_quantization
from tests.backends.driver import Driver, Seq, llama


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
STEPS = [(25, 0), (17, 1), (38, 3)]
"""(tokens, sampled rows) of the steps of `served` that are long."""


def served(arch: ArchSpec, device: str, **config: object) -> tuple[list[Seq], list[torch.Tensor]]:
    """Three sequences whose chunks stand beside decoding rows, then four tokens of each; and the pages."""
    driver = Driver(Runner(), arch, seed=5, device=device, **config)
    seqs = [driver.new(driver.prompt(length), num_logprobs=0) for length in (40, 30, 9)]
    driver.step([(seqs[0], 25)])  # nobody samples
    driver.step([(seqs[0], 8), (seqs[2], 9)])
    driver.step([(seqs[2], 1), (seqs[0], 7), (seqs[1], 30)])
    for _ in range(3):
        driver.step([(seq, 1) for seq in seqs])
    caches = [cache.clone() for cache in driver.runner._work._loaded.caches]  # type: ignore[attr-defined]
    driver.runner.shutdown()
    return seqs, caches


def check_same(
    cut: tuple[list[Seq], list[torch.Tensor]], whole: tuple[list[Seq], list[torch.Tensor]], null: slice
) -> None:
    """null: what of the axis of pages is no null page."""
    for ours, theirs in zip(cut[0], whole[0], strict=True):
        assert ours.outputs == theirs.outputs
        assert ours.errors == theirs.errors
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
    for ours_too, theirs_too in zip(cut[1], whole[1], strict=True):
        axis = 2 if ours_too.dim() == 6 else 3
        kept, wanted = (x.movedim(axis, 0)[null] for x in (ours_too, theirs_too))
        torch.testing.assert_close(kept, wanted, atol=2e-5, rtol=1e-4)
        assert kept.abs().amax(dim=0).flatten(1).amax(dim=1).min() > 0  # every layer has written
