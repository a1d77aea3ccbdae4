"""Accelerators as data: memory, bandwidth, peaks and links of each, with the page that says so, and slices of them.

Vendors' figures are peaks, so what is divided by them is a floor. `memory_bytes` is what a program is given, not what
the box says: less than the vendor's figure by what firmware or driver keep. Read by engine/capacity. Bytes and seconds
are plain units here (no GB/s); a device is what jax or CUDA shows as one, of which a TPU7x chip has two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Literal

from engine.errors import ConfigError

GIB = 1 << 30
TERA = 10**12
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
COUNTS = ("1", "2", "4", "8")  # of one host

XLA = "libtpu 0.0.42.1: the HBM that its compiler allows a program"
SCALING_BOOK = "https://jax-ml.github.io/scaling-book/tpus/ (int8)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One kind of chip. Figures are of one device, `link` of a chip.

    flops: peak operations a second, two a multiply-add, by the type of the factors, without sparsity; a type that is
        not there has no units of its own.
    link: bytes a second that a chip can send to its neighbours together, one way; None = not published.
    topologies: slices that can be had, ascending.
    """

    name: str
    kind: Literal["tpu", "gpu"]
    product: str
    devices: int = 1  # of a chip
    memory_bytes: int
    bandwidth: float  # bytes a second
    flops: dict[str, float]
    link: float | None
    topologies: tuple[str, ...]
    sources: tuple[str, ...]
    jax_name: str = ""  # what jax calls a device of it


CHIPS = (
    Chip(
        name="v5e", kind="tpu", product="TPU v5e", memory_bytes=int(15.75 * GIB), bandwidth=0.819 * TERA,
        flops={"bfloat16": 197 * TERA, "int8": 393 * TERA}, link=0.2 * TERA, topologies=FLAT,
        sources=("https://cloud.google.com/tpu/docs/v5e (ICI 400 GB/s both ways)",
                 "https://cloud.google.com/tpu/docs/v6e (int8 of v5e)", XLA),
        jax_name="TPU v5 lite",
    ),
    Chip(
        name="v6e", kind="tpu", product="TPU v6e (Trillium)", memory_bytes=int(31.25 * GIB), bandwidth=1.64 * TERA,
        flops={"bfloat16": 918 * TERA, "int8": 1836 * TERA}, link=0.4 * TERA, topologies=FLAT,
        sources=("https://cloud.google.com/tpu/docs/v6e (ICI 800 GB/s both ways)", XLA),
        jax_name="TPU v6 lite",
    ),
    Chip(
        name="v5p", kind="tpu", product="TPU v5p", memory_bytes=int(95.74 * GIB), bandwidth=2.765 * TERA,
        flops={"bfloat16": 459 * TERA, "int8": 918 * TERA}, link=0.6 * TERA, topologies=CUBES[1:],
        sources=("https://cloud.google.com/tpu/docs/v5p (ICI 1200 GB/s both ways)", SCALING_BOOK, XLA),
        jax_name="TPU v5",
    ),
    Chip(
        name="tpu7x", kind="tpu", product="TPU7x (Ironwood)", devices=2, memory_bytes=int(94.75 * GIB),
        bandwidth=7.38 * TERA / 2, flops={"bfloat16": 2307 * TERA / 2, "fp8": 4614 * TERA / 2}, link=0.6 * TERA,
        topologies=CUBES,
        sources=("https://docs.cloud.google.com/tpu/docs/tpu7x (of a chip; ICI 1200 GB/s both ways)", XLA),
        jax_name="TPU7x",
    ),
    Chip(
        name="h100", kind="gpu", product="NVIDIA H100 SXM 80 GB", memory_bytes=int(79.11 * GIB), bandwidth=3.35 * TERA,
        flops={"bfloat16": 989.4 * TERA, "fp8": 1978.9 * TERA, "int8": 1978.9 * TERA}, link=0.45 * TERA,
        topologies=COUNTS,
        sources=("https://www.nvidia.com/en-us/data-center/h100/ (NVLink 900 GB/s both ways)",
                 "https://github.com/vllm-project/vllm/issues/27508 (memory, as CUDA says)"),
    ),
    Chip(
        name="h200", kind="gpu", product="NVIDIA H200 SXM 141 GB", memory_bytes=int(139.8 * GIB), bandwidth=4.8 * TERA,
        flops={"bfloat16": 989.4 * TERA, "fp8": 1978.9 * TERA, "int8": 1978.9 * TERA}, link=0.45 * TERA,
        topologies=COUNTS,
        sources=("https://www.nvidia.com/en-us/data-center/h200/ (NVLink 900 GB/s both ways)",
                 "docs/memory.md (memory, as CUDA says)"),
    ),
    Chip(
        name="a100-80g", kind="gpu", product="NVIDIA A100 SXM 80 GB", memory_bytes=int(79.15 * GIB),
        bandwidth=2.039 * TERA, flops={"bfloat16": 312 * TERA, "int8": 624 * TERA}, link=0.3 * TERA, topologies=COUNTS,
        sources=("https://www.nvidia.com/en-us/data-center/a100/ (NVLink 600 GB/s both ways)",
                 "https://github.com/vllm-project/vllm/issues/4408 (memory, as CUDA says)"),
    ),
    Chip(
        name="l4", kind="gpu", product="NVIDIA L4 24 GB", memory_bytes=int(21.99 * GIB), bandwidth=0.3 * TERA,
        flops={"bfloat16": 121 * TERA, "fp8": 242.5 * TERA, "int8": 242.5 * TERA}, link=None, topologies=COUNTS,
        sources=("https://www.nvidia.com/en-us/data-center/l4/ (PCIe; peaks there are with sparsity, twice these)",
                 "https://github.com/zai-org/CogVLM/issues/236 (memory, as CUDA says of an A10, which has as much)"),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Chips that are wired together: "v6e:2x4", "h200:4"."""

    chip: Chip
    topology: str

    @property
    def num_chips(self) -> int:
        return chips_of(self.topology)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    @property
    def text(self) -> str:
        """As --tpu and --gpu take it."""
        return self.chip.name if self.topology == self.chip.topologies[0] else f"{self.chip.name}:{self.topology}"


def chips_of(topology: str) -> int:
    return prod(map(int, topology.split("x")))


def chips_of_kind(kind: str) -> list[Chip]:
    return [chip for chip in CHIPS if chip.kind == kind]


def chip_of(name: str) -> Chip | None:
    """The chip that a device of this name is: what jax calls it, or the product."""
    return next((chip for chip in CHIPS if name and name in (chip.jax_name, chip.product)), None)


def parse_slice(kind: Literal["tpu", "gpu"], text: str) -> Slice:
    """ "v6e:2x4", "h200:4", a bare name for the smallest slice: one chip, of v5p four. Raises ConfigError."""
    name, colon, topology = text.strip().lower().partition(":")
    found = next((chip for chip in CHIPS if chip.name == name), None)
    flag = f"--{kind}"
    if found is None:
        names = [chip.name for chip in chips_of_kind(kind)]
        begins = [known for known in names if name and known.startswith(name)]
        near = accelerator_type(name) or begins or get_close_matches(name, names, n=1, cutoff=0.5)
        did_you_mean = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{flag}: {text!r} is not known; one of {', '.join(names)}{did_you_mean}")
    if found.kind != kind:
        raise ConfigError(f"{flag}: {text!r} is not a {kind.upper()}; did you mean --{found.kind} {text}?")
    if not colon:
        return Slice(chip=found, topology=found.topologies[0])
    if topology in found.topologies:
        return Slice(chip=found, topology=topology)
    near_one = nearest_topology(found, topology)
    raise ConfigError(
        f"{flag}: {text!r}: {topology!r} is not {'a topology' if kind == 'tpu' else 'a number'} of {found.name}; "
        f"one of {', '.join(found.topologies)}; did you mean {near_one!r}?"
    )


def accelerator_type(name: str) -> list[str]:
    """ "v6e-8" of the TPU API as it is spelt here: chips, of v5p cores, two a chip."""
    match = re.fullmatch(r"(v5e|v5litepod|v6e|v5p)-(\d{1,4})", name)
    if match is None:
        return []
    known = "v5e" if match[1] == "v5litepod" else match[1]
    chip = next(chip for chip in CHIPS if chip.name == known)
    return [nearest_topology(chip, str(int(match[2]) // (2 if known == "v5p" else 1)))]


def nearest_topology(chip: Chip, wrong: str) -> str:
    """Of the topologies the one with the nearest number of chips, or that is spelt nearest."""
    if re.fullmatch(r"\d{1,4}(x\d{1,4})*", wrong):
        wanted = chips_of(wrong)
        return f"{chip.name}:{min(chip.topologies, key=lambda known: abs(chips_of(known) - wanted))}"
    near = get_close_matches(wrong, chip.topologies, n=1, cutoff=0.0)
    return f"{chip.name}:{near[0] if near else chip.topologies[0]}"
