"""The processes of `twinfer compile --jobs`: what they answer, what is refused, and that a lost one is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import EngineConfig, ScheduleConfig
from engine.entrypoints.compile_worker import CompileLaunch, Task
from engine.entrypoints.compile_workers import Workers
from engine.errors import ConfigError, StartupError
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model"))


def test_processes_that_compile_are_refused_where_they_make_no_sense(model: Path, tmp_path: Path) -> None:
    for jobs, tpu, said in (
        (2, [], "--jobs: 2 is not accepted; expected no --jobs without --tpu"),
        (0, ["--tpu", "v6e"], "--jobs: 0 is not accepted; expected an integer >= 1"),
    ):
        command = ["-m", "twinfer", "compile", str(model), "-o", str(tmp_path / "b"), "--jobs", str(jobs), *tpu]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and said in done.stderr


def test_a_process_that_ends_and_one_that_refuses_are_told(model: Path) -> None:
    config = EngineConfig(device="cpu", schedule=ScheduleConfig(max_num_seqs=2, max_num_batched_tokens=16))
    workers = Workers(1, CompileLaunch(config=config, model_path=str(model), tpu=None))
    try:
        with pytest.raises(StartupError, match="has another platform"):
            workers.check_key({"platform": "tpu"})
        (answer,) = workers.map([Task(name="take-16", num_pages=(9,))])
        assert answer.program is not None and answer.program[0] == "take-16" and len(answer.program[1]) > 100
        with pytest.raises(ConfigError, match="no program nothing"):
            list(workers.map([Task(name="nothing", num_pages=(9,))]))
        workers.processes[0].kill()
        with pytest.raises(StartupError, match="a process that compiles ended"):
            list(workers.map([Task(name="take-16", num_pages=(9,))]))
    finally:
        workers.close()
