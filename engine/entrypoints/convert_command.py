"""The body of `twinfer convert SRC DST`: a safetensors checkpoint becomes an Orbax one for the JAX backend.

The result has the same config.json and tokenizer files, the parameters in parts, and our manifest. It is built beside
DST and renamed when it is complete: an interrupted conversion leaves nothing that could be served. Called by the CLI.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.errors import ConfigError
from engine.frontend.hub import TEXT_FILES
from engine.runner import Progress, load_writer
from engine.specs.checkpoint import INDEX_NAME, read_config, stream_params
from engine.specs.families import parse_config
from engine.specs.manifest import is_orbax, list_files, write_manifest
from engine.specs.weights import num_parameters


def run(source: Path, target: Path, progress: Progress | None = None) -> str:
    """Convert the checkpoint folder `source` into the new folder `target`; returns one line for the user.

    Raises ConfigError where `target` is in use, CheckpointError where `source` is damaged.
    """
    if is_orbax(source):
        raise ConfigError(f"SRC: {source} is an Orbax checkpoint already")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"DST: {target} exists; expected a new or empty folder")
    arch = parse_config(read_config(source))
    if arch.quant is not None:
        raise ConfigError(f"SRC: {source} is quantised ({arch.quant.method}); --backend torch serves it as it is")
    writer = load_writer("orbax")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        copy_text_files(source, partial)
        parts = writer.write(partial, stream_params(source, arch, progress))
        write_manifest(partial, parts)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    num_bytes = sum(size for _, size in list_files(target))
    count = f"{len(parts)} part" + "s" * (len(parts) > 1)
    return f"{target}: {num_parameters(arch):,} parameters in {count}, {num_bytes:,} bytes"


def copy_text_files(source: Path, target: Path) -> None:
    """config.json, generation_config.json, tokenizer and chat template: all that serving reads beside the weights."""
    for pattern in TEXT_FILES:
        for file in source.glob(pattern):
            if file.name != INDEX_NAME:
                shutil.copyfile(file, target / file.name)
