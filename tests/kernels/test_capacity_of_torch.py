"""engine/capacity's estimate for a GPU against the exact plan of backends/torch: never less, and not much more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.interpreter import DEVICE  # before triton

pytest.importorskip("triton")

from backends.torch import memory
from backends.torch.device import describe
from bench.shapes import GEMMA_27B, LLAMA_8B, LLAMA_70B
from engine.capacity.parts import LIBRARY_BYTES, device_info, gpu_parts, parts, weight_tensors
from engine.config import EngineConfig, ModelConfig, ScheduleConfig
from engine.resolve import resolve
from engine.specs.chips import parse_slice
from engine.specs.families import parse_config
from engine.specs.parallel import rank_arch
from tests.engine.specs.test_families import PUBLISHED

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="works plans out, whatever the device")
GPU = device_info(parse_slice("gpu", "h200").chip)
MULTIPROCESSORS = 132
MIB = 1 << 20
SCHEDULES = {
    "usual": ScheduleConfig(),
    "few": ScheduleConfig(max_num_seqs=16, max_num_batched_tokens=1024),
    "long": ScheduleConfig(max_num_batched_tokens=65536),
    "many": ScheduleConfig(max_num_seqs=4096),
}


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(
    "config", [*PUBLISHED.values(), LLAMA_8B, LLAMA_70B, GEMMA_27B], ids=[*PUBLISHED, "8B", "70B", "27B"]
)
def test_never_less_than_the_plan(config: dict[str, Any], schedule: ScheduleConfig, quantization: str | None) -> None:
    arch = rank_arch(parse_config(config), 1)
    asked = EngineConfig(model=ModelConfig(quantization=quantization), schedule=schedule)
    runner = resolve(asked, arch, GPU).runner
    exact = memory.plan(replace(runner, device="cpu"), MULTIPROCESSORS)
    ours = parts(runner, weight_tensors(runner.arch, 1, runner.dtype, "gpu").values(), "gpu")
    assert ours["weights"] <= exact["weights"]  # which has the allocator's rounding in it
    assert sum(exact.values()) <= sum(ours.values()) <= sum(exact.values()) + 384 * MIB


def test_what_a_gpu_says_that_does_not_depend_on_it() -> None:
    theirs = describe(torch.device("cpu"))
    for name in ("page_tokens", "quantization", "bucket_style", "max_in_flight", "capabilities"):
        assert getattr(GPU, name) == getattr(theirs, name), name
    assert memory.LIBRARY_BYTES == LIBRARY_BYTES


def test_parts_follow_the_flags() -> None:
    def part(name: str, **values: int) -> int:
        config = EngineConfig(model=ModelConfig(max_model_len=8192), schedule=ScheduleConfig(**values))
        return gpu_parts(resolve(config, parse_config(LLAMA_8B), GPU).runner)[name]

    assert part("activations", max_num_batched_tokens=16384) > part("activations")
    assert part("logits_and_sampling", max_num_seqs=512) < part("logits_and_sampling")
    assert part("tables", max_num_seqs=2048) > part("tables")
