"""Build cuda_kernels/prebuilt/libtwinfer_torch_cpu-<machine>.so from the C++ files beside this one.

    python cuda_kernels/csrc/build_cpu.py [--output FILE]

The result is shipped, so that nobody needs a compiler to install twinfer. The library carries the digest of the sources
it was made from; a test compares the two. The product kernel is that of pallas_kernels/csrc. OpenMP's functions are
left for the process to provide: torch loads them.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "pallas_kernels" / "csrc"
KERNEL = SHARED / "cpu_linear_kernel.cc"  # compiled once per instruction set
ENTRIES = (HERE / "cpu_decode.cc", HERE / "cpu_linear.cc")
SOURCES = (*ENTRIES, KERNEL, SHARED / "cpu_linear.h", SHARED / "cpu_vector.h")
BUILDS = {"base": (4, "x86-64-v2"), "v3": (8, "x86-64-v3"), "v4": (16, "x86-64-v4")}  # name: (lanes, architecture)
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-w"]
FLAGS += ["-fno-threadsafe-statics"]  # the one there is, is set to the same by whoever comes
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-mprefer-vector-width=512"]
LOOSE = ["-fno-signed-zeros", "-fassociative-math"]  # sums in any order, where loops are left to the compiler


def source_digest() -> str:
    """sha256 over the C++ sources, hex."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def library_path() -> Path:
    return HERE.parent / "prebuilt" / f"libtwinfer_torch_cpu-{platform.machine()}.so"


def build(output: Path) -> None:
    """Compile with g++. Raises CalledProcessError."""
    output.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for name, (lanes, architecture) in BUILDS.items():
            objects.append(f"{folder}/kernel-{name}.o")
            options = [f"-march={architecture}", f"-DTWINFER_ISA={name}", f"-DTWINFER_LANES={lanes}"]
            subprocess.run(["g++", *FLAGS, *options, "-c", str(KERNEL), "-o", objects[-1]], check=True)
        for entry in ENTRIES:
            objects.append(f"{folder}/{entry.name}.o")
            options = [*LOOSE, f'-DTWINFER_SOURCE="{source_digest()}"']
            subprocess.run(["g++", *FLAGS, *options, "-c", str(entry), "-o", objects[-1]], check=True)
        link = ["g++", "-shared", "-nodefaultlibs", "-s", *objects, "-lm", "-lc", "-lgcc", "-o", str(output)]
        subprocess.run(link, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=library_path())
    args = parser.parse_args()
    build(args.output)
    print(f"{args.output}: {args.output.stat().st_size} bytes, sources {source_digest()[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
