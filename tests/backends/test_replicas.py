"""Data replicas of the jax backend, through the whole engine, give what one device gives."""

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
from engine.runner import Capability, DeviceInfo
from tests.backends.driver import llama
from tests.backends.replica_runs import PAGES
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8_per_token_head"])
def test_the_same_over_replicas(kv_dtype: str, tmp_path: Path) -> None:
    """Alone, beside tensor parallelism, and where ranks of a replica share KV heads: every token, float32."""
    told = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    model = write_checkpoint("llama", tmp_path / "model")
    bundle = tmp_path / "bundle"
    flags = "--device cpu --dtype float32 --max-num-seqs 4 --max-num-batched-tokens 64 --max-model-len 128 "
    flags += f"--num-gpu-blocks-override {PAGES} --block-size 16 --data-parallel-size 2 --tensor-parallel-size 2 "
    flags += f"--num-scheduler-steps 8 --kv-cache-dtype {kv_dtype}"
    plain = kv_dtype == "auto"
    cases = ["1x1", "4x1", "2x2", "2x4", "1x1x8", "4x1x8", "2x4x8"] if plain else ["1x1", "4x1", "2x2", "1x1x8"]
    pages = f"/{kv_dtype}"
    for command in (
        ["twinfer", "compile", str(model), "-o", str(bundle), *flags.split()],
        ["tests.backends.replica_runs", str(model), *(case + pages for case in cases), f"2x2x8{pages}:{bundle}"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, **told}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    alone, turned = found.pop("1x1" + pages), found["1x1x8" + pages]
    assert len(alone["tokens"]) == 24 and len(alone["logprobs"]) == len(alone["prompt"]) == 6
    for size, answers in found.items():
        assert answers["tokens"] == alone["tokens"], size
        for kind in ("logprobs", "prompt"):
            for scores, wanted in zip(answers[kind], alone[kind], strict=True):
                # a sum in another order may move a rounded key or value to its neighbour
                np.testing.assert_allclose(scores, wanted, atol=2e-4 if plain else 5e-3)
        one = turned if "x8" in size else alone
        assert answers["num_compiles"] == (0 if ":" in size else one["num_compiles"])
        assert answers["several"] if "x8" in size else not answers["several"]
        assert answers["num_pages"] == alone["num_pages"] * int(size[0])


@pytest.mark.parametrize(
    ("replicas", "ranks", "able", "said"),
    [
        (2, 1, False, "2 is not supported by this backend"),
        (3, 4, True, "3 copies of 4 devices are more than the 8 devices"),
        (0, 1, True, "0 is not accepted; expected an integer >= 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(replicas: int, ranks: int, able: bool, said: str) -> None:
    device = DeviceInfo(
        kind="tpu", name="TPU v6e", memory_bytes=1 << 35, free_bytes=1 << 35, max_in_flight=2, page_tokens=128,
        capabilities=frozenset({Capability.REPLICAS}) if able else frozenset(), num_devices=8,
    )  # fmt: skip
    config = EngineConfig(parallel=ParallelConfig(data_parallel_size=replicas, tensor_parallel_size=ranks))
    with pytest.raises(ConfigError, match=f"--data-parallel-size: {said}"):
        resolve(config, llama(), device)
