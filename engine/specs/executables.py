"""A bundle of executables that `twinfer compile` wrote: a folder with manifest.json and one file a program.

Programs are raw bytes of the runtime that made them and are trusted as code: a folder or file that another user owns,
or that others may write, is not read. The manifest says what the programs were built for (`key`, text by field), how
many KV pages they take and how many bytes beside weights and pages, and of each program its size, its sha256, a digest
of the arguments' shapes and the tree of its results. It is written last, and the whole folder is renamed into place.
Nothing here knows a framework: backends/jax/aot.py fills the key and runs the programs; engine/core/start.py takes the
page counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import ConfigError, one_line

FORMAT, VERSION = "twinfer-executables", 1
MANIFEST = "manifest.json"
REMEDY = "build it again with `twinfer compile`, or leave --executables out"
NAME = re.compile(r"[a-z0-9_]+(-[0-9]+)*")

Compiled = tuple[str, bytes, str, Any]
"""A program as a bundle holds it: name, bytes, digest of its arguments, the tree of its results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One program. args: digest of its arguments' tree, shapes and dtypes. out: the tree of its results, as JSON."""

    size: int  # bytes
    sha256: str
    args: str
    out: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    key: dict[str, str]  # field -> what the programs were built for
    num_pages: tuple[int, ...]  # of each pool, the null page included
    workspace_bytes: int  # that steps take of a device beside weights and pages
    programs: dict[str, Entry]  # by name; the file is name + ".pjrt"


def refuse(path: Path, what: str) -> NoReturn:
    raise ConfigError(f"--executables: {path}: {what}; {REMEDY}")


def untrusted(status: os.stat_result) -> str | None:
    """Why code from a file or folder is not run; None when it may be."""
    if status.st_uid != os.getuid():
        return "another user owns it"
    if stat.S_IMODE(status.st_mode) & 0o022:
        return "others may write it"
    return None


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# writing


def write(
    folder: Path,
    key: Mapping[str, str],
    num_pages: tuple[int, ...],
    programs: Iterable[Compiled],
    workspace_bytes: int = 0,
) -> Manifest:
    """Write the bundle `folder`. Raises ConfigError."""
    check_target(folder)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(mode=0o700)
    try:
        entries = {}
        for name, data, args, out in programs:
            write_file(partial / f"{name}.pjrt", data)
            entries[name] = Entry(size=len(data), sha256=digest(data), args=args, out=out)
        manifest = Manifest(key=dict(key), num_pages=num_pages, workspace_bytes=workspace_bytes, programs=entries)
        body = {
            "key": manifest.key,
            "num_pages": list(num_pages),
            "workspace_bytes": workspace_bytes,
            "programs": {
                name: {"size": entry.size, "sha256": entry.sha256, "args": entry.args, "out": entry.out}
                for name, entry in entries.items()
            },
        }
        document = {"format": FORMAT, "version": VERSION, "sha256": digest(canonical(body)), **body}
        write_file(partial / MANIFEST, json.dumps(document, indent=1).encode())
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def check_target(folder: Path) -> None:
    """Raise ConfigError where a bundle cannot be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"-o: {folder} exists; expected a new or empty folder")


def write_file(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


# reading


def read_trusted(path: Path) -> bytes:
    """The bytes of a file of a bundle. Raises ConfigError where it is missing or not this user's alone to write."""
    try:
        with path.open("rb") as file:
            reason = untrusted(os.fstat(file.fileno()))
            if reason is not None:
                refuse(path, reason)
            return file.read()
    except OSError as error:
        refuse(path, error.strerror or type(error).__name__)


def read_manifest(folder: Path) -> Manifest:
    """Raises ConfigError naming the file and what is wrong with it."""
    try:
        reason = untrusted(folder.stat())
    except OSError as error:
        refuse(folder, error.strerror or type(error).__name__)
    if reason is not None:
        refuse(folder, reason)
    path = folder / MANIFEST
    data = read_trusted(path)
    try:
        document = json.loads(data)
    except ValueError:
        refuse(path, "not JSON")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        refuse(path, "not the manifest of a bundle of executables")
    if document.get("version") != VERSION:
        refuse(path, f"format version {document.get('version')!r}, this twinfer reads {VERSION}")
    body = {name: document.get(name) for name in ("key", "num_pages", "workspace_bytes", "programs")}
    if document.get("sha256") != digest(canonical(body)):
        refuse(path, "its sha256 does not match")
    return parse(path, body)


def parse(path: Path, body: dict[str, Any]) -> Manifest:
    """The manifest, with the types that the rest relies on."""
    key, pages, programs = body["key"], body["num_pages"], body["programs"]
    if not isinstance(key, dict) or not all(isinstance(value, str) for value in key.values()):
        refuse(path, "key is not an object of texts")
    if not isinstance(pages, list) or not pages or not all(type(n) is int and n > 1 for n in pages):
        refuse(path, "num_pages is not a list of page counts")
    if type(body["workspace_bytes"]) is not int or body["workspace_bytes"] < 0:
        refuse(path, "workspace_bytes is not a number of bytes")
    if not isinstance(programs, dict) or not programs:
        refuse(path, "programs is not an object")
    entries = {name: parse_entry(path, name, entry) for name, entry in programs.items()}
    return Manifest(key=key, num_pages=tuple(pages), workspace_bytes=body["workspace_bytes"], programs=entries)


def parse_entry(path: Path, name: str, entry: Any) -> Entry:
    kinds = {"size": int, "sha256": str, "args": str}
    shaped = NAME.fullmatch(name) and isinstance(entry, dict) and set(entry) == {*kinds, "out"}
    if not shaped or any(type(entry[part]) is not kind for part, kind in kinds.items()):
        refuse(path, f"program {one_line(name, 80)!r} is not well formed")
    return Entry(**entry)


def check_key(folder: Path, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raise ConfigError naming the first field in which the bundle's key differs from what runs here."""
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        built, here = theirs.get(name, "absent"), ours.get(name, "absent")
        if built != here:
            remedy = "give the flag that it was built with; or " if name.startswith("--") else ""
            raise ConfigError(
                f"--executables: {folder}: {one_line(name, 80)} is {one_line(built)!r} in the bundle and "
                f"{one_line(here)!r} here; {remedy}{REMEDY}"
            )


def read_program(folder: Path, manifest: Manifest, name: str) -> tuple[Entry, bytes]:
    """A program's entry and its bytes, checked. Raises ConfigError."""
    entry = manifest.programs.get(name)
    if entry is None:
        refuse(folder, f"it has no program {name}")
    path = folder / f"{name}.pjrt"
    data = read_trusted(path)
    if len(data) != entry.size:
        refuse(path, f"{len(data):,} bytes, the manifest says {entry.size:,}")
    if digest(data) != entry.sha256:
        refuse(path, "its sha256 does not match the manifest's")
    return entry, data
