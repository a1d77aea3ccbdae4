"""From a folder to parameters: finds the shards, matches tensors with the ParamSpec table, streams the numbers.

All matching happens on headers, before a byte of data is read: each parameter has exactly one tensor, each tensor has
a use (or is on the short list of harmless extras), shapes and dtypes agree with config.json. Then parameters are read
in file order, one at a time, so that host memory holds one parameter and not a shard. Called by the backends' load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.specs.arch import ArchSpec
from engine.specs.quant_checks import check_extras, check_groups
from engine.specs.safetensors import (
    FLOATS,
    MAX_HEADER_BYTES,
    STORED,
    TensorEntry,
    first_non_finite,
    parse_json,
    read_header,
    read_tensor,
    refuse,
)
from engine.specs.weights import ParamSpec, RawTensor, Source, input_groups, param_table

INDEX_NAME = "model.safetensors.index.json"
MANIFEST_NAME = "twinfer_checkpoint.json"  # see manifest.py
PART_OF_MANY = re.compile(r"-of-0*([2-9]|[1-9]\d+)\.")  # model-00001-of-00002.safetensors
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # recomputed; old exports of Llama carry it
FOREIGN_FORMATS = {
    ".bin": "PyTorch pickles",
    ".pt": "PyTorch pickles",
    ".pth": "PyTorch pickles",
    ".gguf": "GGUF",
    ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights",
}
Progress = Callable[[str, int, int], None]
"""(phase, done, total), phase "weights" in bytes; the runner's Progress."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One parameter and what of the tensor holds it: [start, stop) of one axis."""

    param: ParamSpec
    entry: TensorEntry
    start: int
    stop: int
    axis: int = 0


def read_config(path: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder. Raises CheckpointError naming the file."""
    return read_json(path / "config.json", "a model folder has one")


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON file of a checkpoint folder, at most MAX_HEADER_BYTES long."""
    try:
        if file.stat().st_size > MAX_HEADER_BYTES:
            refuse(file, f"is over {MAX_HEADER_BYTES} bytes")
        text = file.read_bytes()
    except FileNotFoundError:
        refuse(file, f"not found; {remedy}")
    except OSError as error:
        refuse(file, f"cannot be read ({error.strerror})")
    return parse_json(file, text)


def find_shards(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint with its checked header entry. Raises CheckpointError."""
    if not path.is_dir():
        refuse(path, "is not a folder; give a folder with config.json and *.safetensors")
    if (path / MANIFEST_NAME).exists():
        refuse(path, "an Orbax checkpoint of twinfer convert; --backend jax reads it, others need its safetensors")
    index = path / INDEX_NAME
    # consolidated.safetensors is the same model once more in Mistral's own names; published beside the shards.
    files = sorted(f for f in path.glob("*.safetensors") if not f.name.startswith("consolidated"))
    if index.exists():
        return read_sharded(path, index, files)
    if not files:
        refuse_format(path)
    if len(files) > 1 or PART_OF_MANY.search(files[0].name):
        refuse(path, f"{len(files)} safetensors files ({files[0].name}, ...) and no {INDEX_NAME}; download it too")
    return read_header(files[0])


def refuse_format(path: Path) -> None:
    """Name what the folder has instead of safetensors."""
    if (path / "consolidated.safetensors").exists():
        refuse(path, "only consolidated.safetensors (Mistral's own names); use the repository's model-*.safetensors")
    for suffix, name in FOREIGN_FORMATS.items():
        if any(path.glob("*" + suffix)):
            refuse(path, f"has {name} (*{suffix}) and no *.safetensors; convert with save_pretrained of transformers")
    refuse(path, "no *.safetensors in it")


def read_sharded(path: Path, index: Path, files: list[Path]) -> dict[str, TensorEntry]:
    """A sharded checkpoint: the index names exactly the files there are, and each file exactly its tensors."""
    weight_map = read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(index, "weight_map is not an object with tensor names")
    expected: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(".safetensors"):
            refuse(index, f"{name}: {shard!r} is not the name of a *.safetensors file in this folder")
        expected.setdefault(shard, set()).add(name)
    for shard in expected:
        if not (path / shard).is_file():
            refuse(path / shard, f"missing, {INDEX_NAME} lists it with {len(expected[shard])} tensors; download it")
    for file in files:
        if file.name not in expected:
            refuse(file, f"not listed in {INDEX_NAME}; remove the file or fix the index")
    entries: dict[str, TensorEntry] = {}
    for shard, names in sorted(expected.items()):
        header = read_header(path / shard)
        for name in sorted(names ^ set(header)):
            where = "is listed for this file and is not in it" if name in names else f"is not listed in {INDEX_NAME}"
            refuse(path / shard, f"{name}: {where}")
        entries |= header
    return entries


def assign(path: Path, arch: ArchSpec, entries: dict[str, TensorEntry]) -> list[Assignment]:
    """Match every parameter with its tensor, in file order. Raises CheckpointError."""
    assignments = []
    covered: dict[str, int] = {}  # tensor name -> entries of its axis in use
    for param in param_table(arch):
        if param.optional and not any(source.name in entries for source in param.sources):
            continue
        source, entry = pick_source(path, param, entries)
        part = check_entry(param, source, entry, arch)
        assignments.append(part)
        count = part.stop - part.start
        covered[entry.name] = count if source.shared else covered.get(entry.name, 0) + count
    axes = {part.entry.name: part.axis for part in assignments}
    extras = []
    for name, entry in entries.items():
        if name not in covered:
            extras += [] if is_harmless(name, arch) else [entry]
            continue
        total = entry.shape[axes[name]] if entry.shape else 1
        if covered[name] != total:
            refuse(entry.file, f"{name}: {covered[name]} rows are used, it has {total}")
    for entry in check_extras(arch, extras):
        refuse(entry.file, f"{entry.name}: not a parameter of {arch.family} as config.json describes it")
    return sorted(assignments, key=lambda part: (part.entry.file.name, part.entry.start, part.start))


def pick_source(path: Path, param: ParamSpec, entries: dict[str, TensorEntry]) -> tuple[Source, TensorEntry]:
    for source in param.sources:
        if source.name in entries:
            return source, entries[source.name]
    files = sorted({entry.file for entry in entries.values()})
    remedy = "" if param.quant is None or not param.field else f" (quantization_config says {param.quant.text})"
    refuse(files[0] if len(files) == 1 else path / INDEX_NAME, f"{param.sources[0].name}: missing{remedy}")


def check_entry(param: ParamSpec, source: Source, entry: TensorEntry, arch: ArchSpec) -> Assignment:
    """Shape and dtype against the table and config.json."""
    sizes = list(param.shape)
    if source.rows is not None:
        sizes[source.axis] = source.rows
    expected = tuple(sizes)
    if entry.shape != expected and not (param.flat and without_ones(entry.shape) == without_ones(expected)):
        refuse(entry.file, f"{entry.name}: shape {list(entry.shape)}, config.json means {list(expected)}")
    known = [name for name, (dtype, _) in STORED.items() if dtype == param.dtype] or list(FLOATS)
    if entry.dtype not in known:
        refuse(entry.file, f"{entry.name}: dtype {entry.dtype} is not supported; expected {', '.join(known)}")
    if param.dtype is None and {FLOATS[entry.dtype][0], arch.checkpoint_dtype} == {"float16", "bfloat16"}:
        refuse(entry.file, f"{entry.name}: dtype {entry.dtype}, config.json says {arch.checkpoint_dtype}; correct it")
    start = 0 if source.start is None else source.start
    return Assignment(param, entry, start, expected[source.axis] if source.stop is None else source.stop, source.axis)


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def is_harmless(name: str, arch: ArchSpec) -> bool:
    """Extras that change nothing: recomputed buffers, a tied head, other parts of a composite model."""
    if name.endswith(IGNORED_SUFFIXES) or name.startswith(arch.names.ignored or ("\0",)):
        return True
    return arch.tied_embeddings and name in arch.names.heads


def stream_params(
    path: Path, arch: ArchSpec, progress: Progress | None = None, *, scan: bool = True
) -> Iterator[tuple[ParamSpec, RawTensor]]:
    """Each parameter of `arch` exactly once, in file order, one in memory at a time; absent optional ones at the end.

    progress: told ("weights", bytes read, bytes in all). scan: refuse NaN and infinity. Raises CheckpointError.
    """
    entries = find_shards(path)
    assignments = assign(path, arch, entries)
    check_tied_head(arch, entries)
    total = sum(part_bytes(part) for part in assignments)
    done = 0

    def read(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress("weights", done, total)

    for part in assignments:
        tensor = read_part(part, read)
        if part.param.init == "groups":
            check_groups(part.param, tensor, part.entry)
        bad = first_non_finite(tensor) if scan else None
        if bad is not None:
            refuse(part.entry.file, f"{part.entry.name}: NaN or infinity at element {bad} of {part.param.name}")
        yield part.param, tensor
    if arch.quant is not None:
        present = {part.param.name for part in assignments}
        for param in param_table(arch):
            if param.name not in present:
                yield param, input_groups(param)


def read_part(part: Assignment, read: Callable[[int], None]) -> RawTensor:
    """The parameter's numbers; of a later axis than the first, the whole tensor is read for a part of it."""
    entry = part.entry
    if part.axis == 0:
        return read_tensor(entry, part.start, part.stop, part.param.shape, read)
    whole = read_tensor(entry, 0, entry.shape[0], entry.shape, read)
    cut = (slice(None),) * part.axis + (slice(part.start, part.stop),)
    return RawTensor(whole.dtype, np.ascontiguousarray(whole.data[cut]))


def part_bytes(part: Assignment) -> int:
    """What read_part reads."""
    num_bytes = part.entry.stop - part.entry.start
    rows = part.entry.shape[0] if part.entry.shape else 1
    return num_bytes if part.axis else num_bytes // rows * (part.stop - part.start)


TIED_ROWS = 1024


def check_tied_head(arch: ArchSpec, entries: dict[str, TensorEntry]) -> None:
    """A head stored beside tied embeddings must equal them (transformers only warns and unties the pair)."""
    if not arch.tied_embeddings:
        return
    embed = next(param for param in param_table(arch) if param.name == "embed")
    present = [entries[source.name] for source in embed.sources if source.name in entries]
    first = present[0]
    for other in present[1:]:
        if (other.dtype, other.shape) != (first.dtype, first.shape):
            refuse(other.file, f"{other.name}: tied to {first.name} but of another shape or dtype")
        for row in range(0, first.shape[0], TIED_ROWS):
            stop = min(row + TIED_ROWS, first.shape[0])
            shape = (stop - row, *first.shape[1:])
            left, right = (read_tensor(entry, row, stop, shape, lambda _: None).data for entry in (first, other))
            if left.tobytes() != right.tobytes():
                refuse(other.file, f"{other.name}: differs from {first.name}; set tie_word_embeddings to false")
