"""engine/capacity knows of backends/jax what it says and what it takes: whoever changes one changes the other."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import jax
import pytest

from backends.jax import mesh
from backends.jax.programs import ProgramSet
from backends.jax.split import Split
from backends.jax.weights import load_params, param_bytes
from bench.shapes import GEMMA_27B, LLAMA_8B, TINY
from engine.capacity.parts import device_info, tpu_parts, weight_sizes
from engine.config import EngineConfig, ScheduleConfig
from engine.resolve import resolve
from engine.specs.chips import CHIPS, parse_slice
from engine.specs.families import parse_config
from engine.specs.weights import dummy_params
from tests.backends.driver import llama


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip.kind == "tpu"], ids=lambda chip: chip.name)
def test_a_tpu_says_the_same(chip: object) -> None:
    """But for its name: jax calls v6e "TPU v6 lite"."""
    ours = device_info(chip)  # type: ignore[arg-type]
    stats = {"bytes_limit": ours.memory_bytes, "bytes_in_use": 0}
    device = SimpleNamespace(platform="tpu", device_kind=ours.name, memory_stats=lambda: stats)
    theirs = mesh.describe(mesh.Target((device,)))  # type: ignore[arg-type]
    for field in fields(ours):
        if field.name != "num_devices":  # of a slice, which the plan knows
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize("config", [TINY, LLAMA_8B, GEMMA_27B], ids=["tiny", "8B", "27B"])
@pytest.mark.parametrize("schedule", [ScheduleConfig(), ScheduleConfig(max_num_seqs=7, max_num_batched_tokens=1000)])
def test_the_workspace_is_what_jax_takes_off(config: dict[str, object], schedule: ScheduleConfig) -> None:
    device = device_info(parse_slice("tpu", "v6e").chip)
    runner = resolve(EngineConfig(schedule=schedule), parse_config(config), device).runner
    assert sum(tpu_parts(runner).values()) == ProgramSet.workspace_bytes(runner)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_counted_to_the_byte(dtype: str) -> None:
    arch = llama(vocab_size=203, windows=(None, 20))
    params = load_params(arch, dummy_params(arch, 0), dtype, Split(jax.devices()[:1]))
    assert param_bytes(params) == sum(weight_sizes(arch, 1, dtype, "tpu").values())
