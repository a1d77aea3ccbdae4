"""A model over several devices gives what one gives: the same tokens, log-probabilities to float32's rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.config import EngineConfig, ParallelConfig
from engine.errors import ConfigError
from engine.resolve import resolve
from engine.runner import DeviceInfo
from tests.backends.driver import llama

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        ("unrolled", "1 2 4 8"),
        ("scanned", "1 8"),
        ("tokens", "1 2 8"),
        ("orbax", "1 2 4 8"),
        ("int8", "1 4"),
        ("fp8", "1 4"),
        ("int8_pages", "1 2 8"),
    ],
)
def test_the_same_over_many_devices(layers: str, sizes: str) -> None:
    """8 devices hold 4 KV heads twice, and the last of them fewer ids than the others."""
    told = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.backends.split_runs", layers, *sizes.split()]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **told}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    alone = found.pop("1")
    for size, rows in found.items():
        for (tokens, logprobs), (wanted, wanted_logprobs) in zip(rows, alone, strict=True):
            assert tokens == wanted, size
            # with rounded inputs, or keys and values, a sum in another order may move one to its neighbour
            near = {"int8": 3e-2, "fp8": 3e-2, "int8_pages": 5e-3}.get(layers, 2e-4)
            np.testing.assert_allclose(logprobs, wanted_logprobs, atol=near)


@pytest.mark.parametrize(
    ("size", "devices", "said"),
    [
        (4, 2, "4 is more than the 2 devices"),
        (3, 8, "3 does not divide 4 attention heads"),
        (0, 8, "expected an integer"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size: int, devices: int, said: str) -> None:
    device = DeviceInfo(
        kind="tpu", name="TPU v6e", memory_bytes=1 << 35, free_bytes=1 << 35, capabilities=frozenset(), max_in_flight=2,
        page_tokens=128, num_devices=devices,
    )  # fmt: skip
    config = EngineConfig(parallel=ParallelConfig(tensor_parallel_size=size))
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size: .*{said}"):
        resolve(config, llama(), device)
