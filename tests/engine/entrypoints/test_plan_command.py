"""`twinfer plan` as it is typed: text, --json, exit status, one line for what is wrong, and no framework."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.shapes import LLAMA_8B, LLAMA_70B, TINY
from engine.entrypoints.cli import main
from engine.specs.chips import CHIPS

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With config.json alone, of an 8B model."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def as_json(folder: Path, capsys: Capture, *words: str) -> tuple[int, dict[str, Any]]:
    status = main(["plan", str(folder), *words, "--json"])
    out = capsys.readouterr().out
    found = json.loads(out)
    assert json.dumps(found, indent=2) + "\n" == out  # one object, nothing else, no NaN
    return status, found


def test_what_fits(folder: Path, capsys: Capture) -> None:
    assert main(["plan", str(folder), "--tpu", "v6e"]) == 0
    out, err = capsys.readouterr()
    assert not err
    for text in (
        f"fits: {folder} on v6e",
        "llama, 8,030,261,248 parameters, bfloat16, KV cache bfloat16",
        "weights                  14.96 GiB  exact",
        "131,072 bytes a token, pages of 128",
        "98,688 tokens of KV cache; largest context of one request 98,688",
        "largest batch at 4,096 tokens each: 24",
        "floor of a step: peaks of the data sheet, nothing measured",
        "decode, 1 x 4,096      9.48 ms  at most 105",
    ):
        assert text in out, text
    assert "predict" not in out and "refuses" not in out


def test_what_does_not_fit(folder: Path, capsys: Capture) -> None:
    assert main(["plan", str(folder), "--tpu", "v5e"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("does not fit: ") and "too much                 2.216 GiB" in out
    assert "each of these alone would make it fit" in out and "\n  --tpu v6e\n" in out
    assert "\n  --quantization fp8\n" in out


def test_json_has_the_same_numbers(folder: Path, capsys: Capture) -> None:
    status, found = as_json(folder, capsys, "--tpu", "v6e:2x2", "--max-model-len", "8K", "--max-num-seqs", "64")
    assert status == 0 and found["fits"] is True
    norms = 65 * 4096  # whole on each rank
    assert found["parts"]["weights"] == 2 * ((8_030_261_248 - norms) // 4 + norms)
    assert found["needed_bytes"] == sum(found["parts"].values())
    assert found["needed_bytes"] + found["kv_cache_bytes"] + found["free_bytes"] == found["usable_bytes"]
    assert (found["tensor_parallel_size"], found["num_chips"], found["backend"]) == (4, 4, "jax")
    assert (found["max_model_len"], found["context"], found["largest_batch"]) == (8192, 8192, 64)
    steps = [(floor["step"], floor["batch"], floor["context"]) for floor in found["floors"]]
    assert steps == [("decode", 1, 8192), ("decode", 64, 8192), ("prefill", 1, 2048)]
    for floor in found["floors"]:
        busy = max(floor["weights_s"], floor["products_s"]) + max(floor["kv_s"], floor["attention_s"])
        assert floor["floor_s"] == busy and floor["tokens_per_s"] == floor["tokens"] / busy
        assert floor["collective_s"] > 0
    assert found["changes"] == [] and found["refused_by_serve"] == []
    status, found = as_json(folder, capsys, "--tpu", "v5e")
    assert status == 1 and found["fits"] is False and found["floors"] == []
    assert {"change": "--tpu v6e", "served": True} in found["changes"]


@pytest.mark.parametrize(
    "words",
    [
        "--tpu v5e",
        "--tpu v6e --max-model-len 100k",
        "--tpu v6e --max-num-seqs 2048 --max-model-len 128K",
        "--tpu v5e:2x4 -tp 1",
        "--tpu v5e:2x4 -dp 8",
        "--tpu v5e:2x4 -tp 1 -dp 8",
        "--tpu v6e --gpu-memory-utilization 0.5",
        "--gpu l4 --max-num-seqs 4096",
        "--gpu l4 --max-num-batched-tokens 64k",
        "--gpu l4 --max-model-len 64k --block-size 128",
        "--gpu h100 --gpu-memory-utilization 0.2",
        "--gpu h200 --max-model-len 128K --gpu-memory-utilization 0.2",
    ],
)
def test_every_change_that_is_named_does_fit(folder: Path, capsys: Capture, words: str) -> None:
    status, found = as_json(folder, capsys, *words.split())
    assert status == 1 and found["changes"]
    for change in found["changes"]:
        status, changed = as_json(folder, capsys, *words.split(), *change["change"].split())
        assert status == 0, change
        assert set(changed["refused_by_serve"]) <= set(found["refused_by_serve"]) or not change["served"]


def test_where_no_single_change_helps(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA_70B | {"hidden_size": 1 << 15, "intermediate_size": 1 << 17})
    )
    status, found = as_json(tmp_path, capsys, "--gpu", "l4")
    assert status == 1 and found["changes"] == []
    assert main(["plan", str(tmp_path), "--gpu", "l4"]) == 1
    assert "no single change would make it fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tpu v6f", "--tpu: 'v6f' is not known; one of v5e, v6e, v5p, tpu7x; did you mean 'v6e'?"),
        ("--tpu v6e:2x3", "did you mean 'v6e:2x2'?"),
        ("--gpu v6e", "did you mean --tpu v6e?"),
        ("", "give one of --tpu (such as v6e:2x4) and --gpu (such as h200)"),
        ("--tpu v6e --gpu h200", "give one of --tpu"),
        ("--tpu v6e --tpuu x", "unknown option --tpuu; did you mean '--tpu'?"),
        ("--tpu v6e --port 80", "unknown option --port"),
        ("--tpu v6e --max-seqs 4", "unknown option --max-seqs; did you mean '--max-num-seqs'?"),
        ("--tpu v6e --quantization int8", "--quantization: 'int8' is not accepted; one of fp8"),
        ("--tpu v6e --context many", "--context: 'many' is not accepted; expected an integer such as 4096"),
        ("--tpu v6e:4x8 -tp 3", "--tensor-parallel-size: 3 does not divide 32 attention heads"),
        ("--tpu v6e --max-num-seqs 64 --max-num-batched-tokens 32", "--max-num-batched-tokens: 32 is less than"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(folder: Path, capsys: Capture, words: str, said: str) -> None:
    assert main(["plan", str(folder), *words.split()]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("twinfer: error: ") and err.count("\n") == 1
    assert said in err


def test_a_folder_that_cannot_be_planned(tmp_path: Path, capsys: Capture) -> None:
    """Status 1 says that a model does not fit, and nothing else."""
    assert main(["plan", str(tmp_path), "--tpu", "v6e"]) == 2
    assert "config.json: not found" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "abacus"}))
    assert main(["plan", str(tmp_path), "--tpu", "v6e"]) == 2
    assert "abacus" in capsys.readouterr().err


def test_copies_and_idle_devices_are_said(folder: Path, capsys: Capture) -> None:
    assert main(["plan", str(folder), "--tpu", "v6e:2x4", "-dp", "2", "-tp", "2"]) == 0
    out = capsys.readouterr().out
    assert "8 devices of 31.25 GiB, 4 idle, tensor parallel 2, 2 copies" in out and "room of each copy" in out


def test_help_names_every_status(capsys: Capture) -> None:
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Exit status: 0 it fits, 1 it does not, 2" in out and "[1]" not in out
    assert main(["--help"]) == 0
    assert "plan" in capsys.readouterr().out


CHILD = """
import sys
from engine.entrypoints.cli import main
status = main(sys.argv[1:])
print([name for name in ("jax", "torch", "flax", "triton", "transformers") if name in sys.modules], status)
"""


def test_needs_no_framework_and_two_seconds(folder: Path) -> None:
    """Of a processor's time, so that busy neighbours do not count; with all of the changes that would help."""
    argv = [sys.executable, "-c", CHILD, "plan", str(folder), "--gpu", "l4", "--max-model-len", "128K"]
    before = child_seconds()
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert done.stdout.splitlines()[-1] == "[] 1"
    assert child_seconds() - before < 2.0


def child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_manual_names_every_key_and_chip(folder: Path, capsys: Capture) -> None:
    manual = " ".join((Path(__file__).parents[3] / "docs" / "cli.md").read_text().split())
    described = manual[manual.index("The JSON object:") :]
    _, found = as_json(folder, capsys, "--tpu", "v6e")
    for name in found:
        assert f"`{name}`" in described, name
    for name in (*found["chip"], *found["parts"], *found["floors"][0], "change", "served"):
        assert name in described, name
    chips = manual[manual.index("| chip | memory of a device |") :]
    for chip in CHIPS:
        row = chips[chips.index(f"| {chip.name}") :]
        assert f"{chip.memory_bytes / 2**30:.4g} GiB | {chip.bandwidth / 1e12:g} TB/s |" in row[:80], chip.name
        assert f"| {chip.flops['bfloat16'] / 1e12:g} / " in row[:100], chip.name
