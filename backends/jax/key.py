"""The key of a bundle of executables: everything that its programs depend on beside their arguments, as text by field.

A bundle is loaded only where each field is what it was when it was built; engine/specs/executables.py compares them
and names the one that differs. Source is hashed and not versioned, so a changed kernel is never met by an old program.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import jax
import jaxlib

from backends.jax.compile_cache import processor_digest
from backends.jax.split import Split
from engine.errors import ConfigError
from engine.runner import RunnerConfig
from engine.specs.executables import canonical, digest
from pallas_kernels import cpu_library

SHAPING = {
    "dtype": "--dtype",
    "tensor_size": "--tensor-parallel-size",
    "num_replicas": "--data-parallel-size",
    "kv_dtype": "--kv-cache-dtype",
    "max_slots": "--max-num-seqs",
    "max_model_len": "--max-model-len",
    "page_tokens": "--block-size",
    "token_buckets": "--max-num-batched-tokens",
    "row_buckets": "row buckets",
    "max_num_steps": "--num-scheduler-steps",
    "max_turn_rows": "rows of several turns",
    "sampler_limits": "--max-logprobs",
}
"""Fields of RunnerConfig that programs depend on, besides arch, and what the key calls them: the flag behind each."""
SOURCES = {
    "pallas_kernels": ("pallas_kernels",),
    "jax_models": ("jax_models",),
    "backends/jax": ("backends/jax",),
    "engine": ("engine/specs", "engine/step.py", "engine/opened.py"),
}
"""What programs are traced from: field of the key -> folders and files, from the root of the packages."""
SHORT = 16  # hex digits of a digest in the key


def key_of(config: RunnerConfig, split: Split) -> dict[str, str]:
    """What programs depend on beside their arguments, as text by field."""
    arch = digest(repr(config.arch).encode())[:SHORT]
    key = {
        "platform": split.platform,
        "device": split.device.device_kind,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "runtime": runtime_of(split),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "jax flags": f"matmul precision {jax.config.jax_default_matmul_precision}, x64 {jax.config.jax_enable_x64}",
        "model": f"{config.arch.family} {arch}",
    }
    key |= {label: str(getattr(config, name)) for name, label in SHAPING.items()}
    root = Path(__file__).parents[2]
    key |= {name: source_digest(root, paths) for name, paths in SOURCES.items()}
    if split.platform == "cpu":
        key["cpu_library"] = library_digest()
    return key


def runtime_of(split: Split) -> str:
    """What executes the bytes: libtpu, the GPU's runtime, or this processor's instruction sets."""
    if split.platform == "cpu":
        return f"processor {processor_digest()}"
    if split.platform == "tpu":
        try:
            return f"libtpu {metadata.version('libtpu')}"
        except metadata.PackageNotFoundError as error:
            raise ConfigError("libtpu: its version is not known; install it with pip install 'twinfer[tpu]'") from error
    return " ".join(split.device.client.platform_version.split())


def source_digest(root: Path, paths: tuple[str, ...]) -> str:
    """Of every .py and .json file, its path among them."""
    found: dict[str, str] = {}
    for path in paths:
        whole = root / path
        for file in [whole] if whole.is_file() else whole.rglob("*"):
            if file.suffix in (".py", ".json"):
                found[file.relative_to(root).as_posix()] = digest(file.read_bytes())
    return digest(canonical(found))[:SHORT]


def library_digest() -> str:
    """The C++ kernels that programs of a CPU call by name."""
    if cpu_library.library() is None:
        return "none"
    return digest(cpu_library.path().read_bytes())[:SHORT]
