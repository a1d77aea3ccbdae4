"""The manifest of an Orbax checkpoint that `twinfer convert` wrote: which parameter lies in which part.

A folder with twinfer_checkpoint.json is such a checkpoint. Parameters are logical, as in the ParamSpec table, in parts
of bounded size, each an Orbax checkpoint of its own, so that writing and restoring need the memory of one part. The
manifest is written last: without it the folder is no checkpoint. All is checked against the table before Orbax reads.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.specs.arch import ArchSpec
from engine.specs.checkpoint import MANIFEST_NAME, read_json
from engine.specs.safetensors import refuse
from engine.specs.weights import DTYPE_BYTES, param_table

FORMAT, VERSION = "twinfer-orbax", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One Orbax checkpoint. params: (name, dtype) in order. files: (path inside the part, bytes)."""

    folder: str
    params: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, int], ...]


def is_orbax(path: Path) -> bool:
    """Whether `path` is a folder that twinfer convert wrote."""
    return (path / MANIFEST_NAME).is_file()


def write_manifest(path: Path, parts: list[Part]) -> None:
    """Complete the checkpoint folder `path`, which has its config.json already."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "config_sha256": config_digest(path),
        "parts": [{"folder": part.folder, "params": dict(part.params), "files": dict(part.files)} for part in parts],
    }
    (path / MANIFEST_NAME).write_text(json.dumps(document, indent=1))


def read_manifest(path: Path, arch: ArchSpec) -> list[Part]:
    """The checked parts: each parameter of `arch` once, every file there in full. Raises CheckpointError."""
    file = path / MANIFEST_NAME
    document = read_json(file, "twinfer convert writes it")
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        refuse(file, f"format {document.get('format')!r} version {document.get('version')!r}; convert the model again")
    if document.get("config_sha256") != config_digest(path):
        refuse(file, "config.json has changed since the conversion; convert the model again")
    parts = [parse_part(file, entry) for entry in as_list(file, document.get("parts"))]
    names = [name for part in parts for name, _ in part.params]
    table = {param.name for param in param_table(arch)}
    for name in sorted(table ^ set(names)):
        refuse(file, f"{name}: " + ("missing" if name in table else f"not a parameter of {arch.family}"))
    if len(names) != len(table):
        refuse(file, f"{next(name for name in names if names.count(name) > 1)}: in two parts")
    for part in parts:
        check_files(path / part.folder, part)
    return parts


def config_digest(path: Path) -> str:
    return hashlib.sha256((path / "config.json").read_bytes()).hexdigest()


def as_list(file: Path, value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        refuse(file, "parts is not a list")
    return value


def parse_part(file: Path, entry: object) -> Part:
    """One entry of "parts", with the types that the rest relies on."""
    if not isinstance(entry, dict) or set(entry) != {"folder", "params", "files"}:
        refuse(file, "a part must have exactly folder, params and files")
    folder, params, files = entry["folder"], entry["params"], entry["files"]
    if not isinstance(folder, str) or folder in ("", ".", "..") or folder != Path(folder).name:
        refuse(file, f"folder {folder!r} is not the name of a folder beside the manifest")
    if not isinstance(params, dict) or not all(dtype in DTYPE_BYTES for dtype in params.values()):
        refuse(file, f"{folder}: params is not an object of dtypes ({', '.join(DTYPE_BYTES)})")
    if not isinstance(files, dict) or not all(type(size) is int for size in files.values()):
        refuse(file, f"{folder}: files is not an object of sizes")
    return Part(folder=folder, params=tuple(params.items()), files=tuple(files.items()))


def list_files(folder: Path) -> tuple[tuple[str, int], ...]:
    """Every file of a part with its size, sorted."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return tuple((file.relative_to(folder).as_posix(), file.stat().st_size) for file in found)


def check_files(folder: Path, part: Part) -> None:
    present = dict(list_files(folder))
    for name, size in part.files:
        if name not in present:
            refuse(folder / name, "missing; convert the model again")
        if present[name] != size:
            refuse(folder / name, f"{present[name]} bytes, the manifest says {size}; convert the model again")
    for name in present.keys() - dict(part.files).keys():
        refuse(folder / name, "not listed in the manifest")
