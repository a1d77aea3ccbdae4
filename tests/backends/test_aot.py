"""Executables built ahead: the same tokens with no compiler, every difference and every damage refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import pytest
from jax import monitoring

from backends.jax.aot import Bundle, describe, restore
from backends.jax.build import Builder
from backends.jax.compile import text_of
from backends.jax.compile_cache import processor_digest
from backends.jax.key import SHAPING, key_of, source_digest
from backends.jax.programs import ProgramSet
from backends.jax.runner import Runner
from backends.jax.split import Split
from backends.jax.tables import table_shapes
from backends.jax.weights import load_params, param_shapes
from engine.errors import ConfigError, StepFailed
from engine.runner import ModelRunner, RunnerConfig, SamplerLimits
from engine.specs.cache import CacheLayout, cache_groups
from engine.specs.executables import MANIFEST, canonical, check_key, digest, read_manifest, untrusted, write
from engine.specs.weights import dummy_params
from tests.backends.conformance import Conformance
from tests.backends.driver import Driver, layout, llama
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LIMITS = SamplerLimits(max_logprobs=5, max_logit_bias=16, max_stop_ids=8, max_bad_words=4, max_bad_word_len=4)
SMALL: dict[str, Any] = {"max_slots": 3, "token_buckets": (2, 16), "row_buckets": (2,), "sampler_limits": LIMITS}
FLAGS = ["--max-num-seqs", "2", "--max-num-batched-tokens", "16"]
USE = """
import json, sys
armed = False
def audit(event, args):
    if armed and event == "pickle.find_class":
        raise RuntimeError(f"unpickled: {args}")
sys.addaudithook(audit)
from jax import monitoring
events = []
monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
from twinfer import LLM, SamplingParams
armed = True
llm = LLM(sys.argv[1], max_num_seqs=2, max_num_batched_tokens=16, backend="jax", device="cpu", skip_tokenizer_init=True,
          executables=sys.argv[2] or None)
params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2),
          SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True, repetition_penalty=1.3)]
prompts = [{"prompt_token_ids": list(range(5, 45))}, {"prompt_token_ids": [9, 8, 7]}]
tokens = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]
print(json.dumps({"tokens": tokens, "num_compiles": llm.ready.num_compiles, "notes": llm.ready.notes,
                  "compiling": sorted({event for event in events if "compile" in event}),
                  "pickling": "jax.experimental.serialize_executable" in sys.modules}))
"""


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def use(model: Path, bundle: str, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("-c", USE, str(model), bundle, **environment))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the command line, with jax's own cache of programs on and warm: nothing may come out of it."""
    folder, kept = tmp_path_factory.mktemp("bundle"), tmp_path_factory.mktemp("cache")
    warm = {
        "JAX_COMPILATION_CACHE_DIR": str(kept / "jax" / processor_digest()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    use(model, "", TWINFER_CACHE_DIR=str(kept))
    assert any(Path(warm["JAX_COMPILATION_CACHE_DIR"]).iterdir())
    out = run("-m", "twinfer", "compile", str(model), "-o", str(folder / "b"), "--device", "cpu", *FLAGS, **warm)
    lines = out.splitlines()
    size = sum(file.stat().st_size for file in (folder / "b").glob("*.pjrt"))
    assert lines[-1].startswith(f"{len(list((folder / 'b').glob('*.pjrt')))} programs, {size:,} bytes, "), out
    assert sorted(file.name for file in folder.iterdir()) == ["b"]
    return folder / "b"


def test_another_process_loads_and_compiles_nothing(model: Path, bundle: Path) -> None:
    compiled, loaded = use(model, ""), use(model, str(bundle))
    assert compiled["num_compiles"] > 10 and compiled["compiling"] and not compiled["notes"]
    count = len(read_manifest(bundle).programs)
    assert loaded["notes"] == [f"{count} programs loaded from {bundle}, 0 compiled"]
    assert loaded["num_compiles"] == 0 and loaded["compiling"] == []
    assert not loaded["pickling"]
    assert loaded["tokens"] == compiled["tokens"]


def test_only_this_user_can_write_a_bundle(bundle: Path) -> None:
    assert bundle.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in bundle.iterdir()} == {0o600}


def test_other_flags_are_refused_before_weights_are_read(model: Path, bundle: Path) -> None:
    command = [sys.executable, "-m", "twinfer", "serve", str(model), "--port", "0", "--backend", "jax",
               "--device", "cpu", "--executables", str(bundle), "--max-num-seqs", "4", *FLAGS[2:]]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"--executables: {bundle}: --max-num-seqs is '2' in the bundle and '4' here; give the flag" in done.stderr
    assert "weights" not in done.stderr


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu_bundle_is_built_without_one_and_refused_here(model: Path, tmp_path: Path) -> None:
    command = ["-m", "twinfer", "compile", str(model), "--tpu", "v6e", *FLAGS]
    out = run(*command, "-o", str(tmp_path / "b"), "--jobs", "1")
    assert "programs for TPU v6 lite (libtpu " in out and "processes" not in out
    assert " s in 2 processes" in run(*command, "-o", str(tmp_path / "c"), "--jobs", "2")
    manifest, other = read_manifest(tmp_path / "b"), read_manifest(tmp_path / "c")
    key = manifest.key
    assert (other.key, other.num_pages, other.workspace_bytes) == (key, manifest.num_pages, manifest.workspace_bytes)
    assert list(other.programs) == list(manifest.programs)
    for name, entry in manifest.programs.items():
        same = other.programs[name]
        assert (same.args, same.out) == (entry.args, entry.out) and abs(same.size / entry.size - 1) < 0.05, name
    assert key["platform"] == "tpu" and "cpu_library" not in key
    with pytest.raises(ConfigError, match="platform is 'tpu' in the bundle and 'cpu' here"):
        check_key(tmp_path / "b", key, {**key, "platform": "cpu"})


# in this process: a runner of the driver's tiny model


@cache
def built(config: RunnerConfig, pages: CacheLayout, folder: Path) -> Path:
    """A bundle for a driver's runner, once a session and configuration."""
    target = folder / digest(repr((config, pages)).encode())[:12]
    builder = Builder()
    builder.describe(config.device, None)
    builder.configure(config)
    seen: list[tuple[str, int, int]] = []
    made = builder.build(pages, target, lambda *told: seen.append(told))
    assert seen[-1] == ("programs", made.num_programs, made.num_programs) and len(seen) == made.num_programs
    return target


class LoadingRunner(Runner):
    """A runner that finds a bundle for whatever it was configured for."""

    folder: Path

    def allocate_cache(self, pages: CacheLayout) -> None:
        config = replace(self._config, executables="")
        self._bundle = Bundle.open(built(config, pages, self.folder), config, self._split)
        super().allocate_cache(pages)


class TestLoaded(Conformance):
    """The whole suite, on programs that were loaded."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def somewhere(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        LoadingRunner.folder = tmp_path_factory.mktemp("bundles")

    @classmethod
    def make_runner(cls) -> ModelRunner:
        return LoadingRunner()


def runner_config(**changes: Any) -> RunnerConfig:
    values: dict[str, Any] = {
        "arch": llama(), "dtype": "float32", "kv_dtype": "float32", "max_model_len": 128, "page_tokens": (16,),
        "load_format": "dummy", "device": "cpu", "max_num_steps": 8, **SMALL,
    }  # fmt: skip
    return RunnerConfig(**(values | changes))


def cpu() -> Split:
    return Split(jax.devices("cpu")[:1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = runner_config()
    return built(config, layout(cache_groups(config.arch), num_pages=64), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A bundle of one's own to damage."""
    folder = tmp_path / "copy"
    folder.mkdir(mode=0o700)
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / file.name).chmod(0o600)
    return folder


def start(folder: Path, **changes: Any) -> Driver:
    return Driver(Runner(), **(SMALL | {"executables": str(folder)} | changes))


def test_steps_of_loaded_programs_compile_nothing(tiny: Path) -> None:
    compiled: list[str] = []
    monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    d, other = start(tiny), Driver(Runner(), **SMALL)
    assert d.runner.num_compiles() == 0 < other.runner.num_compiles()
    compiled.clear()
    prompt = d.prompt(12)
    outputs = []
    for driver in (d, other):
        seq = driver.new(prompt, temperature=1.0, seed=5, num_logprobs=3, repetition=1.2, bias={3: 1.0})
        driver.generate([seq], 6, chunk=8)
        outputs.append((seq.outputs, seq.logprobs))
        driver.runner.shutdown()
    assert outputs[0] == outputs[1]
    assert compiled == []


def test_a_lost_cache_is_made_anew_by_the_loaded_program(tiny: Path) -> None:
    d = start(tiny)
    prompt = d.prompt(9)
    first = d.new(prompt)
    d.generate([first], 4)
    assert isinstance(d.runner, Runner) and d.runner._state is not None
    for array in d.runner._state.caches:
        array.delete()
    with pytest.raises(StepFailed) as failure:
        d.runner.collect(d.runner.submit([d.plan([(first, 1)])]))
    assert failure.value.cache_lost
    first.opened = False
    d.close(first)
    again = d.new(prompt)
    d.generate([again], 4)
    assert again.outputs == first.outputs
    d.runner.shutdown()


FIELDS = sorted(key_of(runner_config(), cpu()))


def seal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and give it the digest that fits."""
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    body = {name: document[name] for name in ("key", "num_pages", "workspace_bytes", "programs")}
    (folder / MANIFEST).write_text(json.dumps(document | {"sha256": digest(canonical(body))}))


@pytest.mark.parametrize("field", FIELDS)
def test_a_key_that_differs_is_refused_by_field(field: str, copied: Path) -> None:
    seal(copied, lambda document: document["key"].update({field: "something else"}))
    with pytest.raises(ConfigError, match=r"built? it again with `twinfer compile`|build it again") as refusal:
        start(copied)
    assert f"--executables: {copied}: {field} is 'something else' in the bundle and " in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_field_too_many_or_too_few_is_refused(copied: Path) -> None:
    seal(copied, lambda document: document["key"].update(moon="full"))
    with pytest.raises(ConfigError, match="moon is 'full' in the bundle and 'absent' here"):
        start(copied)
    seal(copied, lambda document: [document["key"].pop(name) for name in ("moon", "jaxlib")])
    with pytest.raises(ConfigError, match="jaxlib is 'absent' in the bundle and "):
        start(copied)


CHANGES: dict[str, dict[str, Any]] = {
    "--dtype": {"dtype": "bfloat16"},
    "--kv-cache-dtype": {"kv_dtype": "bfloat16"},
    "--max-num-seqs": {"max_slots": 4},
    "--max-model-len": {"max_model_len": 64},
    "--tensor-parallel-size": {"tensor_size": 2},
    "--data-parallel-size": {"num_replicas": 2},
    "--block-size": {"page_tokens": (32,)},
    "--max-num-batched-tokens": {"token_buckets": (2, 8)},
    "row buckets": {"row_buckets": (1, 2)},
    "--max-logprobs": {"sampler_limits": replace(LIMITS, max_logprobs=6)},
    "--num-scheduler-steps": {"max_num_steps": 4},
    "rows of several turns": {"max_turn_rows": 2},
    "model": {"arch": llama(vocab_size=200)},
}


@pytest.mark.parametrize("field", CHANGES)
def test_the_key_follows_the_configuration(field: str) -> None:
    before, after = key_of(runner_config(), cpu()), key_of(runner_config(**CHANGES[field]), cpu())
    assert {name for name in before if before[name] != after[name]} == {field}
    assert set(SHAPING.values()) | {"model"} == set(CHANGES)


def test_every_field_of_the_configuration_is_weighed() -> None:
    """A new field of RunnerConfig either shapes programs or is named here as one that does not."""
    others = {
        "max_batched_tokens", "max_in_flight", "load_format", "seed", "device", "attention_backend",
        "batch_invariant", "num_threads", "executables",
    }  # fmt: skip
    assert {field.name for field in fields(RunnerConfig)} == {"arch"} | set(SHAPING) | others


def test_the_key_follows_flags_of_the_compiler_and_sources(tmp_path: Path) -> None:
    code = """
import json, jax
from backends.jax.key import key_of
from backends.jax.split import Split
from engine.runner import RunnerConfig
from tests.backends.driver import llama
config = RunnerConfig(arch=llama(), dtype="float32", kv_dtype="float32", max_slots=1, max_model_len=64,
                      page_tokens=(16,), token_buckets=(1,), row_buckets=(1,))
print(json.dumps(key_of(config, Split(jax.devices("cpu")[:1]))))
"""
    plain = json.loads(run("-c", code))
    for name, value, field in (
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=false", "XLA_FLAGS"),
        ("LIBTPU_INIT_ARGS", "--x=1", "LIBTPU_INIT_ARGS"),
        ("JAX_ENABLE_X64", "1", "jax flags"),
    ):
        other = json.loads(run("-c", code, **{name: value}))
        assert {key for key in plain if plain[key] != other[key]} == {field}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kernel.py").write_text("x = 1\n")
    before = source_digest(tmp_path, ("a",))
    (tmp_path / "a" / "kernel.py").write_text("x = 2\n")
    changed = source_digest(tmp_path, ("a",))
    (tmp_path / "a" / "kernel.py").rename(tmp_path / "a" / "other.py")
    assert len({before, changed, source_digest(tmp_path, ("a",))}) == 3


# damage


def test_a_changed_byte_anywhere_is_refused_by_file(copied: Path) -> None:
    for file in sorted(copied.iterdir()):
        whole = file.read_bytes()
        places = range(0, len(whole), 97) if file.name == MANIFEST else (0, len(whole) // 2, len(whole) - 1)
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1
            if file.name == MANIFEST and same_json(whole, bytes(damaged)):
                continue
            file.write_bytes(damaged)
            with pytest.raises(ConfigError, match=file.name):
                load_all(copied)
        file.write_bytes(whole)
    load_all(copied)


def same_json(left: bytes, right: bytes) -> bool:
    try:
        return bool(json.loads(left) == json.loads(right))
    except ValueError:
        return False


def load_all(folder: Path) -> None:
    config, target = runner_config(), cpu()
    pages = layout(cache_groups(config.arch), num_pages=64)
    opened = Bundle.open(folder, config, target)
    for program in ProgramSet(config, pages, param_shapes(config.arch, "float32", target), target).programs():
        opened.load(program)


def test_a_cut_or_missing_file_is_refused_by_name(copied: Path) -> None:
    file = copied / "forward-16.pjrt"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=rf"forward-16.pjrt: {len(whole) - 1:,} bytes, the manifest says"):
        start(copied)
    file.unlink()
    with pytest.raises(ConfigError, match=r"forward-16.pjrt: No such file"):
        start(copied)
    seal(copied, lambda document: document["programs"].pop("forward-16"))
    with pytest.raises(ConfigError, match="it has no program forward-16"):
        start(copied)
    (copied / MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"manifest.json: No such file"):
        start(copied)
    with pytest.raises(ConfigError, match="nowhere: No such file"):
        start(copied / "nowhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format="else"), "not the manifest of a bundle"),
        (lambda d: d.update(version=2), "format version 2, this twinfer reads 1"),
        (lambda d: d.update(key=[]), "key is not an object of texts"),
        (lambda d: d.update(num_pages=[0]), "num_pages is not a list of page counts"),
        (lambda d: d.update(workspace_bytes=-1), "workspace_bytes is not a number of bytes"),
        (lambda d: d.update(programs={}), "programs is not an object"),
        (lambda d: d["programs"].update({"../x": d["programs"]["fresh"]}), "program '../x' is not well formed"),
        (lambda d: d["programs"]["fresh"].update(size="1"), "program 'fresh' is not well formed"),
        (lambda d: d["programs"]["fresh"].update(out={"Thing": {}}), "program fresh does not load"),
        (lambda d: d["programs"]["fresh"].update(out=["float32", [1]]), "program fresh does not load: it gives other"),
        (lambda d: d["programs"]["fresh"].update(args="0"), "program fresh was built for other arguments"),
    ],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_refused(change: Any, words: str, copied: Path) -> None:
    seal(copied, change)
    with pytest.raises(ConfigError, match=words):
        start(copied)


def test_bytes_that_are_no_executable_are_refused_by_name(copied: Path) -> None:
    (copied / "fresh.pjrt").write_bytes(b"nothing")
    entry = {"size": 7, "sha256": digest(b"nothing")}
    seal(copied, lambda document: document["programs"]["fresh"].update(entry))
    with pytest.raises(ConfigError, match="program fresh does not load"):
        start(copied)


@pytest.mark.parametrize("name", ["", MANIFEST, "open.pjrt"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_is_not_run(name: str, mode: int, copied: Path) -> None:
    path = copied / name if name else copied
    path.chmod(0o700 | mode)
    with pytest.raises(ConfigError, match=f"{path}: others may write it"):
        start(copied)


def test_what_another_user_owns_is_not_run(copied: Path) -> None:
    mine = os.stat(copied)
    assert untrusted(mine) is None
    assert untrusted(os.stat_result([*mine[:4], os.getuid() + 1, *mine[5:10]])) == "another user owns it"
    if os.getuid() == 0:  # only root can give files away
        for path in (copied / "open.pjrt", copied):
            os.chown(path, 12345, -1)
            with pytest.raises(ConfigError, match=f"{path}: another user owns it"):
                start(copied)


# writing


def test_an_interrupted_bundle_leaves_nothing(tmp_path: Path) -> None:
    def programs() -> Any:
        yield "one", b"1", "", None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "b", {}, (2,), programs())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_not_written_over(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"-o: {tiny} exists; expected a new or empty folder"):
        write(tiny, {}, (2,), [])
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", {"a": "b"}, (2, 3), [("one-1", b"1", "digest", ["float32", [1]])])
    assert read_manifest(tmp_path / "empty").num_pages == (2, 3)


def test_trees_come_back() -> None:
    rows, sampler = table_shapes(3, 100, (4, 5), LIMITS)
    tree = {"b": [rows, (sampler,)], "a": (jax.ShapeDtypeStruct((), "bfloat16"),), "c": []}
    back = restore(json.loads(json.dumps(describe(tree))))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(back)] == [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert text_of(("forward", 128)) == "forward-128" and text_of(("open_bias",)) == "open_bias"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_of_parameters_are_those_of_the_arrays(dtype: str) -> None:
    arch = llama(windows=(8, None))
    arrays, shapes = load_params(arch, dummy_params(arch, 0), dtype, cpu()), param_shapes(arch, dtype, cpu())
    assert describe(arrays) == describe(shapes)
