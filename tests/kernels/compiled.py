"""Compiles triton kernels for a GPU that need not be there, in a fresh process: here triton may be its interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

SCRIPT = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def tuples(value):
    return tuple(tuples(part) for part in value) if isinstance(value, list) else value

results = []
for module, name, types, constants, arch, options in json.load(sys.stdin):
    kernel = getattr(importlib.import_module(module), name)
    types = {key: tuples(value) for key, value in types.items()}
    types.update({key: "constexpr" for key in constants})
    places = {(kernel.arg_names.index(key),): tuples(value) for key, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names) if str(types[key])[0] == "*"}
    source = ASTSource(kernel, types, places, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    results.append({"ptx": done.asm["ptx"], "shared": done.metadata.shared})
json.dump(results, sys.stdout)
"""

Kernel = tuple[str, str, dict[str, object], dict[str, object], int, dict[str, object]]
"""module, name, types of the arguments, constants, architecture, options such as num_warps"""


def compile_kernels(kernels: list[Kernel]) -> list[dict[str, object]]:
    """ptx and shared (bytes) of each. An error of the compiler fails the test that asked."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(kernels), env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
