"""chat, complete and bench serve against a server behind a socket."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.entrypoints.bench_load import Observed, report, summarise
from engine.entrypoints.bench_prompts import random_prompts
from engine.entrypoints.cli import main
from tests.engine.entrypoints.conftest import Server


def test_chat_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["chat", "--url", f"{server.url}/v1", "-q", "hi", "--max-tokens", "3", "--stats", "--system-prompt", "be"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out == "ghi\n"
    assert "first token after" in err and "3 tokens" in err


def test_chat_remembers(server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hi", "", "more"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", "--url", server.url, "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out == "gh\ngh\n\n"


def test_complete_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "--url", server.url, "-q", "a", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == "tuvw\n"


def test_a_refusal_is_one_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "--url", server.url, "-q", "a", "--model-name", "other"]) == 1
    assert capsys.readouterr().err == "twinfer: error: model: 'other' is not served here; this server has 'letters'\n"


@pytest.mark.parametrize("kind", ["openai", "openai-chat"])
def test_bench_serve(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    argv = (
        f"bench serve --url {server.url} --num-prompts 6 --random-input-len 5 --random-output-len 4 --request-rate 200"
    )
    argv += (
        f" --max-concurrency 3 --endpoint-type {kind} --save-detailed --result-dir {tmp_path} --result-filename r.json"
    )
    assert main(argv.split()) == 0
    out = capsys.readouterr().out
    assert "Successful requests:" in out and "P99 TTFT (ms):" in out and "Mean TPOT (ms):" in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["completed"] == 6
    assert result["total_output_tokens"] == 24
    if kind == "openai":
        assert result["total_input_tokens"] == 30
    # a token takes 5 ms: four tokens cannot come faster than three gaps of that, nor should they take ten times as long
    assert 14 < result["median_e2el_ms"] < 300
    assert len(result["first_s"]) == 6


def test_bench_serve_jsonl(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "abc", "output_tokens": 2}\n{"prompt": [97, 98]}\n')
    argv = f"bench serve --url {server.url} --dataset-name custom --dataset-path {file} --num-prompts 4"
    assert main([*argv.split(), "--random-output-len", "3"]) == 0
    out = capsys.readouterr().out
    assert "Total generated tokens:                  10" in out
    file.write_text('{"text": 1}\n')
    assert main(argv.split()) == 2


def test_summary_of_known_times() -> None:
    seen = [
        Observed(0, prompt_len=5, output_len=3, first_s=0.1, e2e_s=0.3, gaps_s=[0.1, 0.1]),
        Observed(0, prompt_len=5, output_len=1, first_s=0.2, e2e_s=0.2),
        Observed(0, error="no"),
    ]
    figures = summarise(seen, 2.0, [50])
    assert figures["completed"] == 2 and figures["failed"] == 1
    assert figures["output_throughput"] == 2.0
    assert figures["mean_ttft_ms"] == pytest.approx(150)
    assert figures["mean_tpot_ms"] == pytest.approx(100)
    assert figures["mean_itl_ms"] == pytest.approx(100)
    assert "P50 E2EL (ms):" in report(figures, ["e2el"], [50])


def test_random_prompts() -> None:
    prompts = random_prompts(count=50, input_len=20, output_len=10, ratio=0.5, prefix_len=4, ids=range(9), seed=1)
    assert len({tuple(p.prompt[:4]) for p in prompts}) == 1
    lengths = [len(p.prompt) - 4 for p in prompts]
    assert min(lengths) >= 10 and max(lengths) <= 30 and np.std(lengths) > 2
    again = random_prompts(count=50, input_len=20, output_len=10, ratio=0.5, prefix_len=4, ids=range(9), seed=1)
    assert prompts == again
