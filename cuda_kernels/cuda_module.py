"""A CUDA C++ source as a launchable kernel: compiled at first use by NVRTC, which torch's CUDA wheels bring along.

No compiler is needed where this runs. Libraries are called through ctypes; kernels are launched on torch's current
stream, so a CUDA graph captures them: all blocks resident at once (persistent.py), or in clusters that start while the
kernel in front runs (slab_linear.py).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from triton.runtime.cache import get_cache_manager

CSRC = Path(__file__).parent / "csrc"
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CLUSTER, OVERLAP = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: its value is a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    ]


class CompileError(RuntimeError):
    """The source did not compile, or the driver would not take it."""


class Kernel:
    """One entry point, loaded on the current device."""

    def __init__(self, cubin: bytes, name: str, shared_bytes: int, threads: int) -> None:
        driver = cuda_driver()
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        check(driver.cuModuleLoadData(ctypes.byref(module), cubin), "load")
        check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), "find")
        check(driver.cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, shared_bytes), "give shared memory to")
        self._shared, self._threads = shared_bytes, threads

    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        count = ctypes.c_int()
        found = cuda_driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
            ctypes.byref(count), self._function, self._threads, ctypes.c_size_t(self._shared)
        )
        check(found, "ask for the occupancy of")
        return count.value

    def launch(self, blocks: int, argument: ctypes.Structure) -> None:
        """All blocks resident at once: else the driver refuses. argument: the kernel's only one; it is copied."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        places = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        launched = cuda_driver().cuLaunchCooperativeKernel(
            self._function, blocks, 1, 1, self._threads, 1, 1, self._shared, stream, places
        )
        check(launched, "launch")

    def launch_overlapped(self, blocks: int, argument: ctypes.Structure, cluster: int) -> None:
        """In clusters of so many blocks, while the kernel in front may still run: the kernel itself waits for it."""
        attributes = (Attribute * 2)(Attribute(CLUSTER, 0, (cluster, 1, 1)), Attribute(OVERLAP, 0, (1,)))
        config = LaunchConfig(
            (blocks, 1, 1), (self._threads, 1, 1), self._shared, torch.cuda.current_stream().cuda_stream, attributes, 2
        )
        places = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        launched = cuda_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, places, None)
        check(launched, "launch")


def cubin_of(source: str, defines: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """`compile_source`, kept in triton's cache directory."""
    told = f"{source}{headers()}{sorted(defines.items())}{capability}{torch.version.cuda}"
    cache = get_cache_manager(hashlib.sha256(told.encode()).hexdigest())
    kept = cache.get_file("kernel.cubin")
    if kept is not None:
        return Path(kept).read_bytes()
    cubin = compile_source(source, defines, capability)
    cache.put(cubin, "kernel.cubin", binary=True)
    return cubin


def compile_source(source: str, defines: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """The cubin of a source for one device class."""
    nvrtc = nvrtc_library()
    if nvrtc is None:
        raise CompileError("no NVRTC library was found")
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    included = headers()
    names, texts = ((ctypes.c_char_p * len(included))(*(part.encode() for part in parts)) for parts in zip(*included))
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", len(included), texts, names):
        raise CompileError("NVRTC takes no source")
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CompileError(log.value.decode(errors="replace"))
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def headers() -> tuple[tuple[str, str], ...]:
    """(name, text) of what the sources may include."""
    return tuple((path.name, path.read_text()) for path in sorted(CSRC.glob("*.cuh")))


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the device and torch's libraries can run the kernels of csrc (sm_90)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return nvrtc_library() is not None


@functools.cache
def nvrtc_library() -> ctypes.CDLL | None:
    """NVRTC of torch's CUDA version, or None."""
    for name in _nvrtc_names():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _nvrtc_names() -> Iterator[str]:
    major = (torch.version.cuda or "").split(".")[0] or "[1-9][0-9]"  # any that is installed compiles without a GPU
    yield f"libnvrtc.so.{major}"
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        yield from map(str, sorted(Path(place).glob(f"*/lib/libnvrtc.so.{major}")))
    yield f"/usr/local/cuda/lib64/libnvrtc.so.{major}"


@functools.cache
def cuda_driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check(result: int, what: str) -> None:
    if result:
        text = ctypes.c_char_p()
        cuda_driver().cuGetErrorString(result, ctypes.byref(text))
        raise CompileError(f"cannot {what} the kernel: {(text.value or b'?').decode()}")
