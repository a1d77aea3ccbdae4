"""`twinfer convert` and what the JAX backend restores: the same numbers, sharded, and damage refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from backends.jax import orbax
from backends.jax.load import load_weights
from backends.jax.split import Split
from engine.entrypoints import convert_command, inspect_command
from engine.errors import CheckpointError, ConfigError
from engine.runner import RunnerConfig
from engine.specs.arch import ArchSpec
from engine.specs.checkpoint import MANIFEST_NAME, read_config, stream_params
from engine.specs.families import parse_config
from engine.specs.manifest import is_orbax, read_manifest, write_manifest
from engine.specs.weights import ParamSpec, to_float32
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.engine.specs.damage import FILE, Draft

ROOT = Path(__file__).resolve().parents[3]


def on_one_device(param: ParamSpec) -> orbax.Place:
    return param.shape, jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def restored(folder: Path) -> dict[str, jax.Array]:
    arch = parse_config(read_config(folder))
    return {param.name: array for param, array in orbax.read_params(folder, arch, on_one_device)}


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gemma3", "bfloat16"), ("phi3", "float16")])
def test_same_numbers(family: str, dtype: str, tmp_path: Path) -> None:
    assert family in FAMILIES
    source, target = write_checkpoint(family, tmp_path / "hf", dtype=dtype, tokenizer=True), tmp_path / "orbax"
    text = convert_command.run(source, target)
    assert "parameters in 1 part," in text and is_orbax(target) and not is_orbax(source)
    assert {file.name for file in target.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        MANIFEST_NAME,
        "params-00000",
    }
    arrays, arch = restored(target), parse_config(read_config(source))
    for param, tensor in stream_params(source, arch):
        assert arrays[param.name].dtype.name == tensor.dtype == dtype
        np.testing.assert_array_equal(np.asarray(arrays[param.name], np.float32), to_float32(tensor))


@pytest.mark.parametrize("load_format", ["auto", "orbax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runner_loads_the_same_arrays(load_format: str, dtype: str, tmp_path: Path) -> None:
    source, target = write_checkpoint("phi3", tmp_path / "hf", dtype="bfloat16"), tmp_path / "orbax"
    convert_command.run(source, target)
    arch, split = parse_config(read_config(source)), Split(jax.devices("cpu")[:1])
    config = runner_config(arch, dtype, load_format)
    seen: list[int] = []
    plain = load_weights(replace(config, load_format="auto"), source, split, None)
    ours = load_weights(config, target, split, lambda _, done, total: seen.append(total - done))
    assert jax.tree.structure(ours) == jax.tree.structure(plain) and seen[-1] == 0
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert left.dtype == right.dtype == dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def runner_config(arch: ArchSpec, dtype: str, load_format: str) -> RunnerConfig:
    return RunnerConfig(
        arch=arch,
        dtype=dtype,
        kv_dtype=dtype,
        max_slots=1,
        max_model_len=64,
        page_tokens=(16,),
        token_buckets=(16,),
        row_buckets=(1,),
        load_format=load_format,
    )


def converted(folder: Path, part_bytes: int = 600) -> Path:
    """A tiny checkpoint in several parts."""
    source, target = folder / "hf", folder / "orbax"
    source.mkdir()
    Draft(source).write()
    target.mkdir()
    convert_command.copy_text_files(source, target)
    arch = parse_config(read_config(source))
    write_manifest(target, orbax.write(target, stream_params(source, arch), part_bytes))
    return target


def test_parts_are_bounded(tmp_path: Path) -> None:
    target = converted(tmp_path)
    arch = parse_config(read_config(target))
    parts = read_manifest(target, arch)
    assert len(parts) > 5 and len(restored(target)) == 21
    sizes = {param.name: param.num_elements * 4 for param, _ in stream_params(tmp_path / "hf", arch)}
    for part in parts:
        assert len(part.params) == 1 or sum(sizes[name] for name, _ in part.params) <= 600


def test_restores_into_shards(tmp_path: Path) -> None:
    """In a process of four devices each device gets its rows alone."""
    target = converted(tmp_path)
    code = """
import sys, jax, numpy as np
from pathlib import Path
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from backends.jax import orbax
from engine.specs.checkpoint import read_config
from engine.specs.families import parse_config
from engine.specs.parallel import shard_slices
path = Path(sys.argv[1])
arch = parse_config(read_config(path))
mesh = Mesh(np.array(jax.devices()), ("tensor",))
split = {"heads", "ffn", "vocab"}
def place(param):
    spec = PartitionSpec(*("tensor" if axis in split else None for axis in param.axes))
    return param.shape, NamedSharding(mesh, spec)
for param, array in orbax.read_params(path, arch, place):
    whole = np.asarray(array)
    for rank, shard in enumerate(sorted(array.addressable_shards, key=lambda s: s.device.id)):
        if "kv_heads" not in param.axes:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[shard_slices(param, 4, rank)])
    print(param.name, [s.data.shape for s in array.addressable_shards])
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(target)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **flags}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "layers.1.q [(4, 8), (4, 8), (4, 8), (4, 8)]" in done.stdout


def test_inspect_and_other_backends(tmp_path: Path) -> None:
    target = converted(tmp_path)
    assert "params-00000" in inspect_command.run(target)
    with pytest.raises(CheckpointError, match="Orbax checkpoint of twinfer convert; --backend jax"):
        list(stream_params(target, parse_config(read_config(target))))


def test_targets_in_use_and_sources_in_ruins(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    Draft(source).write()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("mine")
    with pytest.raises(ConfigError, match=r"DST: .*used exists"):
        convert_command.run(source, tmp_path / "used")
    (source / FILE).write_bytes((source / FILE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=FILE):
        convert_command.run(source, tmp_path / "new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "used"]  # nothing half done is left
    with pytest.raises(ConfigError, match="an Orbax checkpoint already"):
        convert_command.run(converted_elsewhere(tmp_path), tmp_path / "new")


def converted_elsewhere(folder: Path) -> Path:
    (folder / "other").mkdir()
    return converted(folder / "other")


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / MANIFEST_NAME).read_text())
        change(document)
        (folder / MANIFEST_NAME).write_text(json.dumps(document))

    return apply


def part_files(folder: Path) -> list[Path]:
    return sorted(file for file in (folder / "params-00001").rglob("*") if file.is_file())


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("version", edit(lambda d: d.update(version=9)), f"{MANIFEST_NAME}: format .* version 9"),
    (
        "config",
        lambda f: (f / "config.json").write_text((f / "config.json").read_text() + " "),
        "config.json has changed",
    ),
    ("no parts", edit(lambda d: d.update(parts=[])), f"{MANIFEST_NAME}: parts"),
    ("part gone", edit(lambda d: d["parts"].pop()), f"{MANIFEST_NAME}: .*: missing"),
    ("part twice", edit(lambda d: d["parts"].append(d["parts"][0])), "in two parts"),
    ("stranger", edit(lambda d: d["parts"][0]["params"].update(ghost="float32")), "ghost: not a parameter"),
    ("dtype", edit(lambda d: d["parts"][0]["params"].update(dict.fromkeys(d["parts"][0]["params"], "int8"))), "dtypes"),
    (
        "other dtype",
        edit(lambda d: d["parts"][0]["params"].update(dict.fromkeys(d["parts"][0]["params"], "float16"))),
        "stored as",
    ),
    ("path", edit(lambda d: d["parts"][0].update(folder="../hf")), "'../hf' is not the name"),
    ("key", edit(lambda d: d["parts"][0].pop("files")), "a part must have exactly"),
    ("file gone", lambda f: part_files(f)[0].unlink(), "params-00001.*: missing"),
    ("file cut", lambda f: part_files(f)[0].write_bytes(b""), "params-00001.*: 0 bytes, the manifest says"),
    ("file too many", lambda f: (f / "params-00001" / "x").write_text("x"), "params-00001/x: not listed"),
    (
        "parts swapped",
        edit(lambda d: d["parts"][0].update(params=d["parts"][1]["params"]) or d["parts"].pop(1)),
        "missing",
    ),
    ("manifest cut", lambda f: (f / MANIFEST_NAME).write_text("{"), f"{MANIFEST_NAME}: not valid JSON"),
]


@pytest.mark.parametrize(("change", "pattern"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage(tmp_path: Path, change: Callable[[Path], object], pattern: str) -> None:
    target = converted(tmp_path)
    change(target)
    with pytest.raises(CheckpointError, match=pattern):
        restored(target)
