"""LLM over a core in this process and in its own: vLLM's shapes, input order, errors first, interrupts."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.core.client import ProcessClient
from engine.core.in_process import InProcessClient
from engine.core.messages import FromCore
from engine.errors import ConfigError, EngineDead, InvalidValue, NeverFits, StartupError
from engine.frontend.llm import LLM
from engine.params import SamplingParams
from tests.engine.core.echo_core import EchoCore, build

ECHO = "tests.engine.core.echo_core"


@pytest.fixture(params=["in_process", "process"])
def llm(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[LLM]:
    client = InProcessClient(build) if request.param == "in_process" else ProcessClient(ECHO)
    with LLM(folders["byte_level"], client=client) as llm:
        yield llm


def test_results_in_input_order(llm: LLM) -> None:
    prompts = ["The fox", {"prompt": "lazy dog"}, [5, 6, 7], {"prompt_token_ids": [8, 9]}]
    params = [SamplingParams(max_tokens=n) for n in (9, 1, 5, 2)]
    results = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
    assert [len(r.outputs[0].token_ids) for r in results] == [9, 1, 5, 2]
    assert [r.prompt for r in results] == ["The fox", "lazy dog", None, None]
    assert results[2].outputs[0].token_ids == [7, 6, 5, 7, 6]
    assert all(r.finished and r.outputs[0].finish_reason == "length" for r in results)
    assert [r.request_id for r in results] == ["0", "1", "2", "3"]
    assert llm.generate([]) == []
    assert len(llm.generate([5, 6])) == len(llm.generate("x")) == 1


def test_stop_string_and_n(llm: LLM) -> None:
    result = llm.generate("abcdefghij", SamplingParams(n=2, stop="f", max_tokens=50))[0]
    assert [o.index for o in result.outputs] == [0, 1]
    assert all(o.stop_reason == "f" and "f" not in o.text for o in result.outputs)
    assert len(llm.generate("x", SamplingParams(max_tokens=3))[0].outputs) == 1


def test_one_bad_prompt_raises_before_anything_runs(llm: LLM) -> None:
    for bad, error in (([5000], InvalidValue), ([5] * 600, NeverFits), ("", InvalidValue)):
        with pytest.raises(error) as raised:
            llm.generate(["good", bad])  # type: ignore[list-item]
        assert isinstance(raised.value, ValueError)
    assert not llm._batches.outputs.requests
    with pytest.raises(InvalidValue, match="2 of them for 1"):
        llm.generate("x", [SamplingParams(), SamplingParams()])
    with pytest.raises(InvalidValue, match="priority"):
        llm.generate("x", priority=[1, 2])


def test_a_request_that_fails_in_the_core_is_an_error_of_its_own(llm: LLM) -> None:
    results = llm.generate([[5, 6], [13]], SamplingParams(max_tokens=2))
    assert [r.outputs[0].finish_reason for r in results] == ["length", "error"]
    assert "13" in str(results[1].outputs[0].stop_reason)


def test_chat(llm: LLM) -> None:
    one = [{"role": "user", "content": "hello"}]
    alone = llm.chat(one, SamplingParams(max_tokens=2))[0]
    many = llm.chat([one, one], SamplingParams(max_tokens=2), add_generation_prompt=False)
    assert alone.prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<nothink>"
    assert [m.prompt for m in many] == ["<|im_start|>user\nhello<|im_end|>\n"] * 2


def test_defaults_tokenizer_and_prefix_cache(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.5)
    tokenizer = llm.get_tokenizer()
    before = llm.inputs.encode("The fox jumps")
    assert tokenizer("The fox jumps", truncation=True, max_length=2)["input_ids"] == before[:2]
    assert llm.inputs.encode("The fox jumps") == before, "the user's copy is not the engine's"
    assert llm.reset_prefix_cache()


class Interrupting(EchoCore):
    """Ctrl-C comes in the middle of the third step."""

    whole_steps = 0

    def step(self) -> list[FromCore]:
        if self.steps == 2:
            signal.raise_signal(signal.SIGINT)
        messages = super().step()
        self.whole_steps += 1
        return messages


def test_interrupt_aborts_everything(folders: dict[str, Path]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process begun in the background has it ignored
    core = Interrupting()
    llm = LLM(folders["byte_level"], client=InProcessClient(lambda *args: (core, build(*args)[1])))
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=50, n=2))
    assert not core.live
    assert core.whole_steps == core.steps, "no step was cut in two"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(llm.generate("a", SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0].token_ids) == 5


def test_death_of_the_core_is_an_error(folders: dict[str, Path]) -> None:
    client = ProcessClient(ECHO)
    llm = LLM(folders["byte_level"], client=client)
    assert client.pid is not None
    client._child.kill()  # type: ignore[union-attr]
    with pytest.raises(EngineDead, match="SIGKILL"):
        llm.generate("x", SamplingParams(max_tokens=400))
    llm.shutdown()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_model_length": 5}, "max_model_length: not an argument of LLM; did you mean 'max_model_len'?"),
        ({"enforce_eager": True}, "enforce_eager: only"),
        ({"trust_remote_code": True}, "--trust-remote-code: refused"),
        ({"chat_template": "{% for %}"}, "--chat-template"),
        ({"generation_config": "/no/such"}, "--generation-config"),
        ({"tokenizer": "/no/such"}, "/no/such"),
    ],
)
def test_options_are_refused_by_name(folders: dict[str, Path], options: dict[str, object], text: str) -> None:
    with pytest.raises(StartupError) as raised:
        LLM(folders["byte_level"], client=InProcessClient(build), **options)  # type: ignore[arg-type]
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


def test_options_reach_the_config(folders: dict[str, Path]) -> None:
    options = {"max_model_len": 64, "max_num_seqs": 7, "tensor_parallel_size": 1, "gpu_memory_utilization": 0.5}
    with LLM(
        folders["byte_level"], client=InProcessClient(build), disable_log_stats=True, enforce_eager=False, **options
    ) as llm:
        config = llm.config
        assert (config.model.max_model_len, config.schedule.max_num_seqs, config.log_stats) == (64, 7, False)
        assert config.cache.gpu_memory_utilization == 0.5
        with pytest.raises(NeverFits):
            llm.generate([[5] * 64])


def test_a_tokenizer_that_wants_to_run_code_does_not(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    for file in folders["byte_level"].iterdir():
        (folder / file.name).write_text(file.read_text())
    canary = tmp_path / "canary"
    settings = (folder / "tokenizer_config.json").read_text()
    auto_map = '{"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil", '
    (folder / "tokenizer_config.json").write_text(auto_map + settings[1:].replace("PreTrainedTokenizerFast", "Evil"))
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
    with LLM(folder, client=InProcessClient(build)) as llm:
        assert llm.generate("The fox", SamplingParams(max_tokens=1))
    assert not canary.exists()


def test_no_tokenizer_no_text(folders: dict[str, Path]) -> None:
    with LLM(folders["byte_level"], client=InProcessClient(build), skip_tokenizer_init=True) as llm:
        result = llm.generate([[5, 6]], SamplingParams(max_tokens=3, logprobs=1))[0]
    assert (result.outputs[0].token_ids, result.outputs[0].text) == ([6, 5, 6], "")


def test_importing_the_public_face_is_light() -> None:
    code = """
import sys, twinfer
heavy = {"jax", "torch", "transformers", "numpy", "fastapi"} & set(sys.modules)
assert not heavy, heavy
for name in twinfer.__all__:
    getattr(twinfer, name)
heavy = {"jax", "flax", "torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
print(twinfer.__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert issubclass(ConfigError, StartupError)
