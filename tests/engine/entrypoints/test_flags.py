"""Flags are the config fields; command line over YAML over defaults; wrong ones named in one line, status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.entrypoints.cli import COMMANDS, main
from engine.entrypoints.flag_texts import ALIASES, CHOICES, HELP, HUMAN_NUMBERS
from engine.entrypoints.flags import (
    Parser,
    UsageError,
    add_flags,
    build,
    build_engine_config,
    engine_flags,
    human_int,
    read_values,
    server_flags,
)
from engine.entrypoints.settings import ServerSettings

FLAGS = [*engine_flags(), *server_flags()]


def values_of(*argv: str) -> dict[str, object]:
    parser = Parser(prog="t", description="")
    parser.add_argument("model_positional", nargs="?")
    parser.add_argument("--config")
    add_flags(parser, FLAGS)
    return read_values(parser.parse_strictly(argv), FLAGS)


def test_every_field_has_a_help_text_and_no_text_is_left_over() -> None:
    names = [flag.name for flag in FLAGS]
    assert len(names) == len(set(names))
    assert set(HELP) == set(names)
    assert set(CHOICES) | set(ALIASES) | HUMAN_NUMBERS <= set(names)


def test_nothing_given_gives_the_defaults() -> None:
    assert build_engine_config(values_of()) == EngineConfig()
    assert build(ServerSettings, values_of()) == ServerSettings()


def test_every_flag_reaches_its_field() -> None:
    words = {int: "7", float: "0.5", str: "text", list: "text"}
    for flag in FLAGS:
        if flag.name == "trust_remote_code":
            continue
        word = CHOICES[flag.name][-1] if flag.name in CHOICES else words.get(flag.kind)
        argv = [flag.option, word] if flag.kind is not bool else ["--no-" + flag.name.replace("_", "-")]
        values = values_of(*argv)  # type: ignore[arg-type]
        expected = {bool: False, list: [word], int: 7, float: 0.5}.get(flag.kind, word)
        assert values == {flag.name: expected}
        config, settings = build_engine_config(values), build(ServerSettings, values)
        assert (config, settings) != (EngineConfig(), ServerSettings()) or flag.default == expected, flag.name


def test_config_file_under_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: from-file\nport: 9000\nmax-model-len: 4k\nenable_prefix_caching: false\n"
        "served-model-name: a\nseed: null\n"
    )
    values = values_of("--config", str(file), "--port", "9001", "positional")
    assert values["model"] == "positional"
    assert values["port"] == 9001
    config = build_engine_config(values)
    assert config.model.max_model_len == 4000
    assert config.model.served_model_name == ("a",)
    assert config.cache.enable_prefix_caching is False
    assert config.model.seed == 0


@pytest.mark.parametrize(
    "text,match",
    [
        ("prot: 1", "unknown option 'prot'; did you mean 'port'"),
        ("port: yes", "port: True is not accepted"),
        ("port: 1.5", "port: 1.5 is not accepted"),
        ("- a", "must hold a mapping"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("backend: tensorflow", "one of auto, jax, torch, fake"),
        ("model: 5", "expected a string"),
    ],
)
def test_bad_config_files(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=match):
        values_of("--config", str(file))


@pytest.mark.parametrize(
    "argv,match",
    [
        (["--prot", "1"], "unknown option --prot; did you mean '--port'"),
        (["--port", "x"], "--port: 'x' is not accepted; expected an integer"),
        (["--max-model-len", "4q"], "such as 4096, 4k .* or auto"),
        (["--max-num-batched-tokens", "auto"], "expected an integer such as 4096"),
        (["--backend", "jaxx"], "did you mean 'jax'"),
        (["--attention-backend", "flash"], "'flash' is not accepted; one of auto, TRITON_ATTN, FLASHINFER"),
        (["--quantization", "fp4"], "--quantization: 'fp4' .*fp8"),
        (["--enable-lora", "true"], "--enable-lora: not supported"),
        (["a", "b"], "unexpected argument 'b'"),
        (["--enable-prefix-caching=maybe"], "expected true or false"),
        (["--config", "/nowhere.yaml"], "cannot read '/nowhere.yaml'"),
    ],
)
def test_bad_command_lines(argv: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        values_of(*argv)


def test_remote_code_is_refused_and_its_refusal_accepted() -> None:
    for argv in (["--trust-remote-code"], ["--trust_remote_code=true"]):
        with pytest.raises(UsageError, match="never runs code of a checkpoint"):
            build_engine_config(values_of(*argv))
    assert build_engine_config(values_of("--trust-remote-code=false")) == EngineConfig()


def test_vllm_spellings() -> None:
    values = values_of("--tensor_parallel_size=1", "-pp", "1", "--served-model-name", "a", "b", "--max-model-len", "2K")
    assert values["tensor_parallel_size"] == values["pipeline_parallel_size"] == 1
    assert values["served_model_name"] == ["a", "b"]
    assert values["max_model_len"] == 2048
    assert human_int("1.5g") == 1_500_000_000
    for words in (["--max-model-len", "auto"], ["--max-model-len", "-1"], ["--max-model-len=-1"]):
        assert build_engine_config(values_of(*words)).model.max_model_len == -1
    assert (
        build_engine_config(values_of("--max-model-len", "32k", "--kv-cache-dtype", "fp8")).model.max_model_len
        == 32_000
    )
    assert build_engine_config(values_of("--batch-invariant")).batch_invariant
    for word, wanted in (("flashinfer", "FLASHINFER"), ("Triton_Attn", "TRITON_ATTN"), ("AUTO", "auto")):
        assert build_engine_config(values_of("--attention-backend", word)).attention_backend == wanted


def test_errors_are_one_line_with_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, status, start in (
        (["srve"], 2, "unknown command 'srve'; did you mean 'serve'?"),
        (["bench", "sevre"], 2, "bench: expected latency, throughput or serve"),
        (["chat", "--url", "http://127.0.0.1:9", "-q", "hi"], 1, "no server at http://127.0.0.1:9"),
        (["serve", "--host", "0.0.0.0"], 2, "--host: 0.0.0.0 lets other machines connect"),
        (["serve", "--bakend", "jax"], 2, "unknown option --bakend"),
        (["bench", "serve", "--num-prompts", "0"], 2, "--num-prompts: 0 is not accepted"),
        (["inspect", "./nowhere"], 1, "nowhere: no such folder"),
    ):
        assert main(argv) == status, argv
        err = capsys.readouterr().err
        assert err.startswith(f"twinfer: error: {start}"), err
        assert err.count("\n") == 1


HEAVY = ("jax", "torch", "transformers", "fastapi", "uvicorn", "numpy", "flax")
PROBE = f"""
import sys, time
from engine.entrypoints.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(time.process_time(), [m for m in {HEAVY} if m in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_imports_no_framework(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *command.split(), "--help"], capture_output=True, text=True, check=True
    )
    seconds, loaded = done.stderr.split(" ", 1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 0.5  # of the processor, start of Python included: other work cannot make it longer
    assert command in done.stdout


def test_the_manual_names_every_option_and_command() -> None:
    manual = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()
    for flag in FLAGS:
        assert f"`{flag.option}`" in manual, flag.option
        assert HELP[flag.name].replace("|", "\\|") in manual, flag.option
    for command in COMMANDS:
        assert f"twinfer {command}" in manual


def test_help_about_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help=cache"]) == 0
    out = capsys.readouterr().out
    assert "--block-size" in out and "--no-enable-prefix-caching" in out and "--port" not in out
    assert main(["serve", "--help=max-model-len"]) == 0
    assert "--max-model-len N" in capsys.readouterr().out
    assert main(["serve", "--help=max-modl-len"]) == 2
    assert "did you mean 'max-model-len'" in capsys.readouterr().err
    assert main(["serve", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: twinfer serve [MODEL] [options]\n")
