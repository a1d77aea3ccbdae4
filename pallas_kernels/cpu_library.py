"""The prebuilt C++ kernels of the CPU (csrc/, built by csrc/build_cpu.py): loading, and their jax.ffi targets.

The library is optional: without it, or on another processor family, the plain functions run.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import jax

TARGETS = ("twinfer_cpu_attention", "twinfer_cpu_linear", "twinfer_cpu_gemm", "twinfer_cpu_layer")


def path() -> Path:
    return Path(__file__).parent / "prebuilt" / f"libtwinfer_cpu-{platform.machine()}.so"


@cache
def library() -> ctypes.CDLL | None:
    """The library with its targets registered, or None where it cannot run."""
    if platform.system() != "Linux" or not path().exists():
        return None
    try:
        loaded = ctypes.CDLL(str(path()))
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, target)), platform="cpu")
    except (OSError, AttributeError, RuntimeError):  # another C library, or another jax.ffi interface version
        return None
    loaded.twinfer_cpu_attention_source.restype = ctypes.c_char_p
    return loaded


def source_digest() -> str:
    """sha256 of the C++ sources that the library was built from, hex."""
    loaded = library()
    if loaded is None:
        raise FileNotFoundError("no prebuilt CPU attention library for this machine")
    digest: bytes = loaded.twinfer_cpu_attention_source()
    return digest.decode()
