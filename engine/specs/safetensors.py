"""Our own reader of the safetensors format: the header is checked to the last byte, data is read with pread.

Layout: u64 little endian header length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
Nothing is mapped: a truncated mapping reads as zeros elsewhere, and a mapped shard counts against nobody's budget.
Every refusal is a CheckpointError that names the file, and the tensor where there is one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError, one_line
from engine.specs.weights import RawTensor

MAX_HEADER_BYTES = 100_000_000
READ_BYTES = 32 << 20  # one pread; also the most that a progress bar lags behind

ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
ITEM_BYTES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
FLOATS: dict[str, tuple[str, np.dtype[Any]]] = {
    "F32": ("float32", np.dtype("<f4")),
    "BF16": ("bfloat16", np.dtype("<u2")),
    "F16": ("float16", np.dtype("<f2")),
}
STORED = FLOATS | {
    "F8_E4M3": ("float8_e4m3", np.dtype("u1")),
    "I8": ("int8", np.dtype("i1")),
    "I32": ("int32", np.dtype("<i4")),
    "I64": ("int64", np.dtype("<i8")),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of one file. start, stop: byte range in the file, half-open."""

    file: Path
    name: str
    dtype: str  # the format's name, e.g. "BF16"
    shape: tuple[int, ...]
    start: int
    stop: int


def refuse(file: Path, message: str) -> NoReturn:
    raise CheckpointError(f"{file}: {one_line(message)}")


def no_duplicates(file: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """A hook for json.loads that refuses a name given twice (the last would win silently)."""

    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            refuse(file, f"{twice!r} appears twice in the JSON")
        return table

    return hook


def parse_json(file: Path, text: bytes) -> dict[str, Any]:
    """A JSON object without duplicate names, NaN or Infinity."""

    def refuse_constant(constant: str) -> NoReturn:
        refuse(file, f"{constant} is not JSON")

    try:
        value = json.loads(text.decode(), object_pairs_hook=no_duplicates(file), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        refuse(file, f"not valid JSON ({error})" if isinstance(error, ValueError) else "JSON nested too deeply")
    if not isinstance(value, dict):
        refuse(file, "the JSON is not an object")
    return value


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of `file`, in data order, after checking all that the format promises."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                refuse(file, f"{size} bytes are too few for a safetensors file; download it again")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                refuse(file, f"a header of {length} bytes is over the limit of {MAX_HEADER_BYTES}; not safetensors?")
            if 8 + length > size:
                refuse(file, f"the header ends at byte {8 + length}, the file at {size}; download it again")
            text = stream.read(length)
    except OSError as error:
        refuse(file, f"cannot be read ({error.strerror})")
    if not text.startswith(b"{"):
        refuse(file, "the header does not start with '{': not safetensors")
    table = parse_json(file, text)
    check_metadata(file, table.pop("__metadata__", None))
    entries = [parse_entry(file, name, value, 8 + length) for name, value in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    at = 8 + length
    for entry in entries:
        if entry.start != at:
            kind = "overlaps its neighbour" if entry.start < at else "leaves a gap before it"
            refuse(file, f"{entry.name}: starts at byte {entry.start}, {at} is expected ({kind})")
        at = entry.stop
    if at != size:
        refuse(file, f"the data ends at byte {at}, the file at {size}; download it again")
    return {entry.name: entry for entry in entries}


def check_metadata(file: Path, metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse(file, "__metadata__ is not an object of strings")


def parse_entry(file: Path, name: str, value: object, base: int) -> TensorEntry:
    """One header entry; python's integers do not overflow, so products are exact."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        refuse(file, f"{name}: the header entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        refuse(file, f"{name}: dtype {dtype!r} is not known")
    if not isinstance(shape, list) or not all(is_size(item) for item in shape):
        refuse(file, f"{name}: shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(item) for item in offsets):
        refuse(file, f"{name}: data_offsets {offsets!r} are not two byte offsets")
    start, stop = offsets
    num_bytes = ITEM_BYTES[dtype]
    for item in shape:
        num_bytes *= item
    if stop - start != num_bytes:
        refuse(file, f"{name}: {dtype} {shape} takes {num_bytes} bytes, data_offsets hold {stop - start}")
    return TensorEntry(file, name, dtype, tuple(shape), base + start, base + stop)


def is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_tensor(
    entry: TensorEntry, start_row: int, stop_row: int, shape: tuple[int, ...], read: Callable[[int], None]
) -> RawTensor:
    """Rows [start_row, stop_row) of `entry` as an array of `shape`. `read` is told the bytes of each pread."""
    dtype, numpy_dtype = STORED[entry.dtype]
    row_bytes = (entry.stop - entry.start) // entry.shape[0] if entry.shape else entry.stop - entry.start
    at, stop = entry.start + start_row * row_bytes, entry.start + stop_row * row_bytes
    data = np.empty(shape, numpy_dtype)
    view = data.reshape(-1).view(np.uint8)  # u8 [bytes], the memory of `data`
    try:
        fd = os.open(entry.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            done = 0
            while at + done < stop:
                got = os.preadv(fd, [view[done : done + READ_BYTES].data], at + done)
                if got == 0:
                    refuse(entry.file, f"{entry.name}: the file ends at byte {at + done}, inside the tensor")
                done += got
                read(got)
        finally:
            os.close(fd)
    except OSError as error:
        refuse(entry.file, f"{entry.name}: cannot be read ({error.strerror})")
    return RawTensor(dtype, data)


SCAN_ITEMS = 1 << 18  # what is scanned at a time stays in the cache
EXPONENT: dict[str, np.unsignedinteger[Any]] = {
    "float32": np.uint32(0x7F800000),
    "bfloat16": np.uint16(0x7F80),
    "float16": np.uint16(0x7C00),
    "float8_e4m3": np.uint8(0x7F),  # no infinities; NaN has every bit but the sign
}


def first_non_finite(tensor: RawTensor) -> int | None:
    """Flat index of the first NaN or infinity, None when there is none. Reads bits, so it needs no float16 unit."""
    if tensor.dtype not in EXPONENT:
        return None
    mask = EXPONENT[tensor.dtype]
    bits: NDArray[np.unsignedinteger[Any]] = tensor.data.reshape(-1).view(mask.dtype)
    exponents = np.empty(min(SCAN_ITEMS, bits.size), mask.dtype)
    for start in range(0, bits.size, SCAN_ITEMS):
        part = exponents[: bits.size - start]
        np.bitwise_and(bits[start : start + SCAN_ITEMS], mask, out=part)
        if part.max() == mask:
            return start + int(part.argmax())
    return None
