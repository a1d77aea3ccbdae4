"""Compiled programs kept between starts: jax's own persistent cache, in a folder that only this user may write.

An entry is raw executable bytes and is trusted as code, so a folder that others own or may write is not used. The
folder's name holds what an entry depends on beyond jax's own key: the processor's instruction sets.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from engine.env import cache_dir
from engine.specs.executables import untrusted

log = logging.getLogger("twinfer.jax")


def processor_digest() -> str:
    """A name for the instruction sets of this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:12]


def prepare(folder: Path) -> str | None:
    """Create the folder for this user alone. -> why it cannot be used, None when it can."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return untrusted(folder.stat())
    except OSError as error:
        return error.strerror or type(error).__name__


def enable() -> Path | None:
    """Keep compiled programs from now on. -> the folder, None when nothing is kept. Never raises for a bad disk."""
    base = cache_dir()
    if base is None:
        return None
    folder = base / "jax" / processor_digest()
    refused = prepare(folder)
    if refused is not None:
        log.warning("compiled programs are not kept: %s: %s", folder, refused)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder


@contextmanager
def disabled() -> Iterator[None]:
    """Inside, every program is compiled, in this process.

    One that comes out of jax's cache cannot be serialised again on a CPU: the bytes load, and fail when they run.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks the setting once a process
    jax.clear_caches()  # a program that a runner of this process took out of the cache would be handed out again
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
