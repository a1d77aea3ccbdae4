"""Kernels that a rehearsal lists and processes compile are found on disk by the launches proper; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# in a process of its own: here triton may be its interpreter. The driver stands for a GPU that is not there.
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
from cuda_kernels import attention_ragged, compile_ahead, compile_jobs, fused, sampling, step_begin
compile_jobs.prime()
attention_ragged.has_tma = lambda device: True  # descriptors are arguments too

def work():
    x, numbers = torch.empty(2, 256, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    table, starts = torch.zeros(5, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    fused.rms_norm(x, torch.empty(256), 1e-6, 0.0)
    sampling.argmax(torch.empty(2, 5000))  # the second kernel shares a function with one that is never hashed here
    rope, tokens = (torch.zeros(32), 1.0), torch.zeros(5, dtype=torch.int64)
    step_begin.begin_decode(numbers, numbers, numbers, tokens, tokens, [rope], x, 1.0, [(*[numbers] * 3, table)])
    q, cache = torch.empty(20, 8, 128, dtype=torch.bfloat16), torch.empty(1, 2, 4, 2, 64, 128, dtype=torch.bfloat16)
    tiles = attention_ragged.make_work(np.array([1, 19]), np.array([0, 0]), 16, torch.device("cpu"))
    attention_ragged.ragged_attention(q, cache, 0, table, numbers, starts, numbers, work=tiles, scale=1.0)

with compile_jobs.rehearsal() as jobs:
    work()
told, hits = [], {}
compilers = compile_ahead.Compilers(2, Path(sys.argv[1]) / "note")
compilers.compile(list(jobs.values()), lambda done, total: told.append([done, total]))
compilers.close()
knobs.compilation.listener = lambda *, src, cache_hit, **_: hits.__setitem__(src.fn.__name__, cache_hit)
launch = JITFunction.run
JITFunction.run = lambda kernel, *args, **options: launch(kernel, *args, **{**options, "warmup": True})
work()
json.dump({"jobs": sorted(job.name for job in jobs.values()), "told": told, "hits": hits}, sys.stdout)
"""


def test_launches_find_what_processes_compiled(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["jobs"] == [
        "begin_kernel",
        "decode_kernel",
        "items_kernel",
        "norm_kernel",
        "pick_kernel",
        "ragged_kernel",
        "scan_kernel",
    ]
    assert found["told"] == [[n, 7] for n in range(1, 8)]
    assert found["hits"] == dict.fromkeys(found["jobs"], True)


def test_a_note_says_that_nothing_is_left_to_compile(tmp_path):
    program = """
import sys
from cuda_kernels import compile_ahead
first, second = compile_ahead.identity("one"), compile_ahead.identity("two")
assert first != second and first == compile_ahead.identity("one")
compilers = compile_ahead.Compilers(0, compile_ahead.note_of("one"))
compilers.leave_note()
assert compile_ahead.begin("one") is None
"""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)


def test_every_file_with_kernels_is_listed():
    from cuda_kernels.compile_jobs import FOLDER, MODULES

    files = {f"cuda_kernels.{path.stem}" for path in FOLDER.glob("*.py") if "\n@triton.jit" in path.read_text()}
    assert files == set(MODULES)
