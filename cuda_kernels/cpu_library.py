"""The prebuilt C++ kernels of the CPU (csrc/, built by csrc/build_cpu.py), called through ctypes.

The library is optional: without it, or on another processor family, plain torch runs. It takes OpenMP's functions, and
so its threads, from torch's own libraries. Called by cpu_decode.py and cpu_linear.py.
"""

from __future__ import annotations

import ctypes
import platform
from ctypes import c_bool, c_char_p, c_int64, c_void_p
from functools import cache
from pathlib import Path


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None where it cannot run."""
    path = Path(__file__).parent / "prebuilt" / f"libtwinfer_torch_cpu-{platform.machine()}.so"
    if platform.system() != "Linux" or not path.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:  # another C library, or a torch without OpenMP
        return None
    loaded.twinfer_decode.argtypes, loaded.twinfer_decode.restype = [c_void_p], None
    loaded.twinfer_linear.argtypes, loaded.twinfer_linear.restype = [c_void_p] * 3 + [c_int64] * 3, c_bool
    loaded.twinfer_torch_cpu_source.restype = c_char_p
    return loaded


def source_digest() -> str:
    """sha256 of the C++ sources that the library was built from, hex."""
    loaded = library()
    if loaded is None:
        raise FileNotFoundError("no prebuilt CPU library for this machine")
    digest: bytes = loaded.twinfer_torch_cpu_source()
    return digest.decode()
