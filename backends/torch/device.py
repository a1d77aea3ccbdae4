"""The device of this process: which it is, how much memory it has, what the runner can do with it."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

import torch

from cuda_kernels import flashinfer_attention
from cuda_kernels.dispatch import has_fused_kernels
from engine.errors import ConfigError
from engine.runner import Capability, DeviceInfo

CAPABILITIES = frozenset({Capability.LATE_MASK, Capability.PROMPT_LOGPROBS})
HOST_SHARE = 4  # a CPU runner takes a quarter of the free memory: the host is not the engine's alone


def describe(device: torch.device) -> DeviceInfo:
    total, free = memory(device)
    cuda = device.type == "cuda"
    if device.type == "xla":
        return describe_xla(total, free)
    return DeviceInfo(
        kind="gpu" if cuda else "cpu",
        name=torch.cuda.get_device_name(device) if cuda else "CPU",
        memory_bytes=total,
        free_bytes=free,
        capabilities=CAPABILITIES | {Capability.BATCH_INVARIANT} if has_fused_kernels(device) else CAPABILITIES,
        max_in_flight=2,
        page_tokens=64,
        default_dtype="bfloat16" if cuda else "float32",
        supported_dtypes=("float32", "bfloat16", "float16") if cuda else ("float32", "bfloat16"),
        kv_dtypes=("fp8_e4m3",) if has_fp8_pages(device) else (),
        attention_backends=attention_backends(device),
        quantization=("fp8", "compressed-tensors", "awq", "gptq"),
        bucket_style="exact",
    )


def describe_xla(total: int, free: int) -> DeviceInfo:
    """Of torch-xla: on a TPU the Pallas kernels want pages of 128 tokens. Weights in few bits and fp8 pages: none."""
    tpu = xla_platform() == "tpu"
    return DeviceInfo(
        kind="tpu" if tpu else "cpu",
        name="TPU through torch-xla" if tpu else "CPU through torch-xla",
        memory_bytes=total,
        free_bytes=free,
        capabilities=CAPABILITIES,
        max_in_flight=2,
        page_tokens=128 if tpu else 64,
        default_dtype="bfloat16" if tpu else "float32",
        supported_dtypes=("float32", "bfloat16"),
        bucket_style="pow2",
    )


def xla_platform() -> str:
    """What torch-xla runs on, as PJRT_DEVICE says or as it finds: "cpu" | "tpu"."""
    from torch_xla import runtime

    return str(runtime.device_type()).lower()


def xla_device() -> torch.device:
    """torch-xla's first device. Raises ConfigError where it is not installed, or has another device than these."""
    remedy = "pip install 'twinfer[torch-xla]' in an environment of its own, as make test-torch-xla does"
    if find_spec("torch_xla") is None:
        raise ConfigError(f"--device: 'xla' needs torch-xla, which is not installed; {remedy}")
    try:
        import torch_xla

        device = torch_xla.device()
    except Exception as error:  # an import of a build for another torch, a client that does not start
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"--device: 'xla' does not start ({cause}); {remedy}, and set PJRT_DEVICE=CPU or TPU"
        ) from error
    if xla_platform() not in ("cpu", "tpu"):
        raise ConfigError(f"--device: 'xla' on PJRT_DEVICE={xla_platform().upper()} is not supported; CPU or TPU")
    return device


def is_host(device: torch.device) -> bool:
    """Whether its memory is the host's."""
    return device.type == "cpu" or (device.type == "xla" and xla_platform() == "cpu")


def attention_backends(device: torch.device) -> tuple[str, ...]:
    """Ours, and FlashInfer's where it is installed."""
    if not has_fused_kernels(device):
        return ()
    there = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return ("TRITON_ATTN", "FLASHINFER") if there and find_spec("flashinfer") else ("TRITON_ATTN",)


def check_flashinfer() -> None:
    """Raise ConfigError where the package is there and cannot be imported, before anything is loaded."""
    try:
        flashinfer_attention.wrapper_class()
    except Exception as error:  # whatever a package of somebody else's raises
        remedy = "leave the flag out, or pip install --force-reinstall 'twinfer[flashinfer]'"
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"--attention-backend: 'FLASHINFER' cannot be imported ({cause}); {remedy}") from error


def has_fp8_pages(device: torch.device) -> bool:
    """Whether the attention kernels take pages of e4m3: they need triton, and a GPU that knows the type."""
    if not has_fused_kernels(device):
        return False
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def memory(device: torch.device) -> tuple[int, int]:
    """(total, free) bytes of a device; of the host for a CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    if not is_host(device):
        from torch_xla.core import xla_model

        found = xla_model.get_memory_info(str(device))
        return found["bytes_limit"], found["bytes_limit"] - found["bytes_used"]
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {name: int(text.split()[0]) for name, text in fields.items()}
    return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let a CPU step reuse the memory of the last one.

    glibc hands every block of some megabytes back to the kernel when it is freed, and page faults then cost an
    elementwise operation on 1000 tokens 2 to 5 times its own time (measured). One arena, because those of threads
    cannot grow as far. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def choose_device(requested: str) -> torch.device:
    """The device of `--device`."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if requested == "xla":
        return xla_device()
    name = {"gpu": "cuda"}.get(requested, requested)
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device: {requested!r} is not known to the torch backend; auto, cpu, cuda or xla")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: 'cuda' was asked for and torch sees no GPU; use --device cpu, or a CUDA torch")
    return torch.device(name)
