"""`twinfer inspect`: layers as runs, parameters, shards, cache groups and bytes, read from headers alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engine.entrypoints.inspect_command import run, size_text
from engine.errors import CheckpointError, ConfigError
from tests.engine.specs.damage import FILE, Draft
from tests.engine.specs.test_families import PUBLISHED


def report(folder: Path, name: str, ranks: int = 1) -> str:
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]))
    return run(folder, ranks)


def test_qwen3(tmp_path: Path) -> None:
    text = report(tmp_path, "Qwen3-0.6B", 4)
    assert "qwen3: 28 layers, 596,049,920 parameters, 1.11 GiB in bfloat16" in text
    assert "0-27 (x28)" in text
    assert (
        "16 heads, 8 KV heads of 128, sees everything before, norms on q and k, rope yarn base 1e+06 factor 4" in text
    )
    assert re.search(r"layers\.\*\.q +28 +\[2048, 1024\] +heads embed +112 MiB +\[512, 1024\] +28 MiB", text)
    assert re.search(r"layers\.\*\.attn_norm +28 +\[1024\] +embed +56 KiB +\[1024\] +56 KiB", text)
    assert "0: full, 8 KV heads of 128, layers 0-27: 28,672 bytes a token in bfloat16" in text
    assert "none (config.json alone)" in text


def test_gemma3_runs_and_groups(tmp_path: Path) -> None:
    text = report(tmp_path, "gemma-3-1b-it")
    assert "0-23 (6 in turn, x4)" in text and "24-25 (x2)" in text
    assert "1. (x5) attention: 4 heads, 1 KV head of 256, sees the last 512 tokens" in text
    assert "RMS norm (weight + 1) before and after each" in text and "embedding times 33.9411" in text
    assert "0: window of 512, 1 KV head of 256, layers 0-4, 6-10, 12-16, 18-22, 24-25: 22,528 bytes a token" in text
    assert "1: full, 1 KV head of 256, layers 5, 11, 17, 23: 4,096 bytes a token" in text


def test_files(tmp_path: Path) -> None:
    text = run(Draft(tmp_path, num_shards=2).write(), 2)
    assert re.search(r"model-00001-of-00002.safetensors +11 +\S+ KiB +F32", text)
    assert "stop ids [2, 3]" in text and "sampling defaults: temperature 0.6" in text


def test_refusals(tmp_path: Path) -> None:
    folder = Draft(tmp_path).write()
    with pytest.raises(ConfigError, match="--tensor-parallel-size: 3 does not divide 4 attention heads"):
        run(folder, 3)
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=FILE):
        run(folder)
    (folder / FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="PyTorch pickles"):
        run(folder)


def test_size_text() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 1.5 * 2**30, 2**50)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 GiB",
        "1024 TiB",
    ]
